"""What may differ between networks of one architecture: which part of a network a tensor belongs to.

A *body* is what every model of a merge must have: its layers, their norms, the embedding. A *part* is what a fine-tune
may have, lose or replace: heads on top, poolers, projections, the other towers of a multimodal network, layers that
predict further tokens, the value head of reinforcement learning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Without these no network of an architecture works, wherever they lie.
_ESSENTIAL = re.compile(
    r"(.*\.)?(\w*norm\w*|layer_?norm\w*|LayerNorm\w*|ln_\w+|embed\w*|wte|wpe|\w*embeddings?|shared|tok_embeddings)"
    r"(\.\w+)?\.(weight|bias|gamma|beta)"
)
_LAYER = re.compile(r"(?:^|.*?\.)layers\.(\d+)\.")
_LOOSE_PARTS = ("logit_scale", "logit_bias", "final_logits_bias")
"""What lies beside all modules: scales of two towers' outputs, and the bias on BART's output, which may be missing."""

_VALUE_HEAD = re.compile(r"v_head\..*")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")

VOCABULARY_VECTORS = re.compile(
    r"([A-Za-z_]\w*\.)*(lm_head\.bias|lm_head\.decoder\.bias|cls\.predictions\.(decoder\.)?bias|predictions\.(decoder\.)?bias"
    r"|embed_out\.bias|vocab_projector\.bias)"
)
"""Vectors with one element for each token."""


class Matched:
    """The tensors that a network shares with another, by every prefix of their names before a layer's number."""

    def __init__(self, names: Iterable[str]) -> None:
        self._prefixes = {prefix for name in names for prefix in _ancestors(name)}

    def is_part(self, name: str) -> bool:
        """Whether a tensor that the other network lacks belongs to a part it does without: nothing of it is shared."""
        if name in _LOOSE_PARTS:
            return True
        free = next((prefix for prefix in _ancestors(name) if prefix not in self._prefixes), None)
        if free is None:
            return False
        # A norm or an embedding with nothing around it that is missing too is no part of its own.
        rest = name.removeprefix(free).removeprefix(".")
        return _ESSENTIAL.fullmatch(name) is None or "." in rest


def _ancestors(name: str) -> Iterator[str]:
    """Prefixes that are modules, the shortest first, up to the first number."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        if parts[length - 1].isdigit():
            return
        yield ".".join(parts[:length])


def is_auxiliary(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to what is trained beside a language model and passed over where it is not looked for.

    DeepSeek and its kin store layers that predict further tokens behind those that ``config.json`` counts; TRL stores
    the value head of reinforcement learning.
    """
    if _VALUE_HEAD.fullmatch(name):
        return True
    layer = _LAYER.match(name)
    sections = (config, *(value for value in config.values() if isinstance(value, Mapping)))
    counts = [section[key] for section in sections for key in _LAYER_COUNTS if isinstance(section.get(key), int)]
    return layer is not None and bool(counts) and int(layer[1]) >= max(counts)
