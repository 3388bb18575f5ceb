"""The parts that a network is put together of: towers for images and sound, what lies between them, and language.

A part is told by the names of modules, which transformers gives alike in all models. Where no name speaks of a tower,
an encoder and a decoder are parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import Mixture, output_weight
from unmergeable.architecture.residual import Residual
from unmergeable.errors import UsageError

_BEGINNINGS = {
    "vision": ("vision", "visual", "image", "video"),
    "audio": ("audio", "speech", "sound"),
    "projector": ("projector", "multimodal", "modal", "connector", "qformer", "resampler"),
    "language": ("language", "text"),
}
_STACKS = ("encoder", "decoder")
_TOWERS = ("vision", "audio", "projector")


def part_of(tensor: str) -> str:
    """The part that a tensor belongs to, by its name; what no name tells is language."""
    words = [word for module in tensor.split(".") for word in re.split("[_-]", module)]
    for word in words:
        for part, beginnings in _BEGINNINGS.items():
            if word.startswith(beginnings):
                return part
    return next((word for word in words if word in _STACKS), "language")


def is_of_a_tower(name: str) -> bool:
    """Whether a setting or a tensor belongs to what turns images or sound into tokens."""
    return part_of(name) in _TOWERS


def parts_of(architecture: Architecture) -> tuple[str, ...]:
    """The parts with a block, in the order of the network."""
    return tuple(dict.fromkeys(part_of(output_weight(block)) for block in architecture.blocks))


def restricted(architecture: Architecture, part: str) -> Architecture:
    """The architecture of one part: blocks, mixtures and streams that lie in it with all their tensors.

    Raises:
        UsageError: the network has no such part; the message lists those it has.
    """
    known = parts_of(architecture)
    if part not in known:
        raise UsageError(
            f"part: this {architecture.family} model has no {part!r} that is known; it has {', '.join(known)}."
        )

    def is_inside(tensors: Iterable[str]) -> bool:
        return all(part_of(name) == part for name in tensors)

    blocks = tuple(block for block in architecture.blocks if is_inside(Architecture("", (block,)).symmetry.legs))
    names = {block.name for block in blocks}
    return replace(
        architecture,
        blocks=blocks,
        shared_heads=tuple(shared for shared in architecture.shared_heads if names.issuperset(shared.blocks)),
        mixtures=tuple(mixture for mixture in architecture.mixtures if is_inside(_tensors(mixture))),
        residuals=tuple(stream for stream in architecture.residuals if is_inside(_tensors(stream))),
        exposed=tuple(stream for stream in architecture.exposed if is_inside(_tensors(stream))),
        missing={name: why for name, why in architecture.missing.items() if part_of(name) == part},
    )


def _tensors(group: Mixture | Residual) -> list[str]:
    if isinstance(group, Mixture):
        return [*group.indexed, *(name for stack in group.stacks for name in stack)]
    norms = [name for norm in group.norms for name in (norm.gain, *(reader.tensor for reader in norm.readers))]
    return [*(axis.tensor for axis in group.axes), *norms]
