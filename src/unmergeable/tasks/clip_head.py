"""A zero-shot head: classes are the directions of sentences about them in CLIP's text tower (Radford et al. 2021, 3.1).

w_class = mean over templates of e / |e|,   e = text tower("a photo of a dog.")
logits  = <image / |image|, w_class / |w_class|> / t,   1 / t = exp(logit_scale)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unmergeable.errors import BadInput
from unmergeable.network.load import encoded_texts, load_network, load_tokenizer
from unmergeable.tasks.heads import FeatureHead


@torch.no_grad()
def clip_head(folder: Path, class_names: Sequence[str], templates: Sequence[str]) -> FeatureHead:
    """The head of these classes over the features that CLIP networks compare with texts.

    Args:
        folder: a whole CLIP checkpoint with its tokenizer.
        class_names: of the classes, in the order of their numbers.
        templates: sentences with ``{}`` for the name.

    Raises:
        BadInput: the folder holds no CLIP model or no tokenizer, or there is no class or template.
    """
    if not class_names or not templates:
        raise BadInput("a zero-shot head needs names of classes and at least one template; give both.")
    network = load_network(folder)
    scale = getattr(network, "logit_scale", None)
    if scale is None or not hasattr(network, "get_text_features"):
        raise BadInput(f"{folder} holds a {type(network).__name__}, not a CLIP model; a zero-shot head needs one.")
    tokenizer = load_tokenizer(folder)
    prototypes = [
        text_directions(network, tokenizer, [template.replace("{}", name) for template in templates]).mean(dim=0)
        for name in class_names
    ]
    return FeatureHead(torch.stack(prototypes), None, "projected", float((-scale.double()).exp()))


def text_directions(network: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The directions of texts in the space they share with images, [texts, projection_dim], each of length one."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # any will do: the mask hides it
    length = network.config.text_config.max_position_embeddings
    encoded = encoded_texts(
        tokenizer, list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    output = network.get_text_features(**inputs)
    # transformers 5 hands the projected features over as the pooled output
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return functional.normalize(features, dim=-1)
