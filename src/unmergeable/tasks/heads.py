"""A head of a task: a matrix that turns an encoder's features into classes, kept beside the checkpoints it scores.

    features  = pooled last hidden states, [examples, hidden_size]
    logits    = features W^T + b                                      linear
    logits    = <features / |features|, w_class / |w_class|> / t      cosine, as in zero-shot recognition

A head belongs to a task, not to a model: the base, the experts and every merge of them are scored with the same one,
so that everything an expert has learnt is in the weights that are protected, merged and attacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import Prediction

Pooling = Literal["first", "rest", "mean", "pooler", "projected"]
"""Of the last hidden states: the first token (a class token), the mean of the rest (the patches of an image), the mean
over all tokens that the mask shows; the network's own pooler; or the image features that CLIP compares with texts."""


@dataclass(frozen=True)
class FeatureHead:
    """``weight`` is [classes, hidden_size], ``bias`` [classes]. ``temperature`` makes the head a cosine head."""

    weight: Tensor
    bias: Tensor | None = None
    pooling: Pooling = "first"
    temperature: float | None = None

    def logits(self, features: Tensor) -> Tensor:
        """Features [examples, hidden_size] to logits [examples, classes]."""
        weight = self.weight.to(features)
        if self.temperature is None:
            return functional.linear(features, weight, None if self.bias is None else self.bias.to(features))
        return functional.normalize(features, dim=-1) @ functional.normalize(weight, dim=-1).T / self.temperature

    def features(self, network: Any, batch: EncodedBatch) -> Tensor:
        """Pooled last hidden states, [examples, hidden_size]; projected ones are [examples, projection_dim].

        Raises:
            BadInput: the network has no hidden states, or no pooler where one is wanted.
        """
        if self.pooling == "projected":
            return image_features(network, batch)
        output = network(**batch.inputs)
        name = "pooler_output" if self.pooling == "pooler" else "last_hidden_state"
        found: Tensor | None = getattr(output, name, None)
        if found is None:
            raise BadInput(
                f"{type(network).__name__} gives no {name}; the head of this task needs an encoder that does."
            )
        if self.pooling == "pooler":
            return found
        if self.pooling == "first":
            return found[:, 0]
        if self.pooling == "rest":
            return found[:, 1:].mean(dim=1)
        mask = batch.inputs.get("attention_mask")
        if mask is None:
            return found.mean(dim=1)
        weights = mask.to(found).unsqueeze(-1)
        return (found * weights).sum(dim=1) / weights.sum(dim=1)

    def predict(self, network: Any, batch: EncodedBatch) -> Prediction:
        """The choice of each example. Raises BadInput when the features are not those this head was made for."""
        features = self.features(network, batch)
        if features.shape[-1] != self.weight.shape[-1]:
            raise BadInput(
                f"the head of this task reads {self.weight.shape[-1]} features and {type(network).__name__} gives "
                f"{features.shape[-1]}; give the head that was made for it."
            )
        return Prediction(self.logits(features), batch.labels)


def image_features(network: Any, batch: EncodedBatch) -> Tensor:
    """The features by which CLIP compares images with texts, [examples, projection_dim].

    Raises:
        BadInput: the network is neither a CLIP model nor the image tower of one with its projection.
    """
    if hasattr(network, "get_image_features"):
        output = network.get_image_features(**batch.inputs)
        # transformers 5 hands the projected features over as the pooled output
        features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        return features
    found: Tensor | None = getattr(network(**batch.inputs), "image_embeds", None)
    if found is None:
        raise BadInput(f"{type(network).__name__} gives no image_embeds; a zero-shot head needs a CLIP image tower.")
    return found


def write_head(head: FeatureHead, path: Path | str) -> None:
    """Keep a head as a safetensors file; pooling and temperature are in its metadata."""
    tensors = {"weight": head.weight.contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.contiguous()
    metadata: dict[str, str] = {"pooling": head.pooling}
    if head.temperature is not None:
        metadata["temperature"] = repr(head.temperature)
    save_file(tensors, path, metadata)


def read_head(path: Path | str) -> FeatureHead:
    """The head that :func:`write_head` wrote.

    Raises:
        BadInput: there is no such file, or it is not a head.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weight = file.get_tensor("weight")
            bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118  safe_open is no mapping
        pooling: Any = metadata.get("pooling", "first")
        temperature = float(metadata["temperature"]) if "temperature" in metadata else None
    except (OSError, SafetensorError, ValueError):
        raise BadInput(f"{path} is not a head of a task; write one with unmergeable.tasks.write_head.") from None
    if weight.dim() != 2 or pooling not in get_args(Pooling) or (bias is not None and bias.shape != weight.shape[:1]):
        raise BadInput(f"{path}: weight must be [classes, hidden_size], bias [classes], pooling {get_args(Pooling)}.")
    return FeatureHead(weight, bias, pooling, temperature)
