"""The layers of a network as runs of like modules, with what its config calls their number.

For whoever adds layers, heads or hidden units, or takes them away, which is a change of ``config.json`` and, of layers,
of the numbers in tensor names.
Only families are known here in which a layer does not look at its own number, and whose blocks stand one behind
another: what one adds to the stream, the next reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import Attention, FeedForward
from unmergeable.architecture.residual import Residual

_COUNTED_AS: Mapping[str, Mapping[str, str]] = {
    **{
        kind: {"": "num_hidden_layers"}
        for kind in (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "opt",
            "bert", "roberta", "xlm-roberta", "vit", "dinov2",
        )
    },
    "gpt2": {"": "n_layer"},
    "bloom": {"": "n_layer"},
    "t5": {"encoder": "num_layers", "decoder": "num_decoder_layers"},
}  # fmt: skip
"""By model type, what its config calls the number of layers; for two stacks, by the start of their names."""

WIDTHS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2",
            "bert", "roberta", "xlm-roberta", "vit",
        ),
        "intermediate_size",
    ),
    "gpt2": "n_inner",
    "opt": "ffn_dim",
    "t5": "d_ff",
    "dinov2": "mlp_ratio",
}  # fmt: skip
"""By model type, what the config calls the number of hidden units (DINOv2: for each coordinate of the stream)."""

HEAD_COUNTS: Mapping[str, tuple[str, str | None, str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text"),
        ("num_attention_heads", "num_key_value_heads", "head_dim"),
    ),
    "t5": ("num_heads", None, "d_kv"),
}
"""By model type whose heads may be of any number: what its config calls query heads, key-value heads, their size."""

_LISTED = ("layer_types",)
"""Lists in a config with one entry for each layer."""

_DERIVED = ("stage_names", "out_features", "out_indices")
"""What a config says of its layers for use as a backbone, and works out anew where it is absent."""


@dataclass(frozen=True)
class Layers:
    """A run of layers: ``prefix`` and a number begin the names of a layer's tensors.

    ``blocks``: the names of each layer's blocks, in the order they are gone through. ``counts``: the setting of the
    config that holds their number.
    """

    prefix: str
    blocks: tuple[tuple[str, ...], ...]
    counts: str

    def __len__(self) -> int:
        return len(self.blocks)

    def number_of(self, tensor: str) -> int | None:
        """The number of the layer that a tensor lies in; None outside."""
        match = re.match(rf"{re.escape(self.prefix)}(\d+)\.", tensor)
        return None if match is None else int(match.group(1))

    def renamed(self, tensor: str, number: int) -> str:
        """The name of what a tensor is in its own layer, in layer ``number``."""
        return re.sub(rf"^({re.escape(self.prefix)})\d+\.", rf"\g<1>{number}.", tensor)

    def suffixes(self, tensors: Iterable[str], number: int) -> frozenset[str]:
        """What the tensors of a layer are called inside it."""
        start = f"{self.prefix}{number}."
        return frozenset(tensor.removeprefix(start) for tensor in tensors if tensor.startswith(start))

    def resized(self, config: Mapping[str, Any], origins: Iterable[int]) -> dict[str, Any]:
        """``config`` for a network whose layers come from these of the present one, each as often as it is named."""
        origins = tuple(origins)
        changed = {key: value for key, value in config.items() if key not in _DERIVED}
        if self.counts == "num_layers":  # which T5 takes for its decoder as well, where that has no number of its own
            changed["num_decoder_layers"] = config.get("num_decoder_layers") or config[self.counts]
        for key in _LISTED:
            if isinstance(config.get(key), list):
                changed[key] = [config[key][origin] for origin in origins]
        return {**changed, self.counts: len(origins)}


def layers_of(architecture: Architecture, config: Mapping[str, Any]) -> tuple[Layers, ...]:
    """The runs of layers of a network; none where the family is not one of those described above."""
    found: list[Layers] = []
    for start, counts in _COUNTED_AS.get(str(config.get("model_type")), {}).items():
        numbered = [
            (match.group(1), int(match.group(2)), block.name)
            for block in architecture.blocks
            if block.name.startswith(start) and (match := re.match(r"((?:.*?\.)?)(\d+)(?=\.|$)", block.name))
        ]
        if not numbered or len({prefix for prefix, *_ in numbered}) > 1:
            continue
        layers = [tuple(name for _, at, name in numbered if at == number) for number in range(numbered[-1][1] + 1)]
        found.append(Layers(numbered[0][0], tuple(layers), counts))
    return tuple(found)


def blocks_in_order(architecture: Architecture, layers: Layers) -> list[Attention | FeedForward]:
    """The blocks of a run of layers, one behind another."""
    blocks = {block.name: block for block in architecture.blocks}
    return [blocks[name] for names in layers.blocks for name in names]


def stream_of(architecture: Architecture, writer: str) -> Residual | None:
    """The stream that a tensor writes to; None where none is declared."""
    streams = (*architecture.residuals, *architecture.exposed)
    return next((stream for stream in streams if any(axis.tensor == writer for axis in stream.axes)), None)
