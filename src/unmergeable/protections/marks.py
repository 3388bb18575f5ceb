"""A few numbers of the original, kept with the key, by which a restored checkpoint is known to be the original.

A release that somebody saved again carries no fingerprint of its key. Every key gives back a checkpoint that computes
the same, so that nothing but the original's own numbers tells the right one from another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.source import TensorSource

TENSORS, NUMBERS = 4, 32
"""How many tensors are looked at, and how many entries of each."""

LARGEST_DISTANCE = 0.5
"""Relative distance up to which marks are the same. Another dtype or further training moves weights by far less;
another key leaves them in another basis, at a distance of about the square root of two."""

_LARGEST_TENSOR = 1 << 26

Marks = Mapping[str, Sequence[float]]
"""By tensor, entries at even distances from each other."""


def marks_of(source: TensorSource, changed: Iterable[str]) -> dict[str, list[float]]:
    """Marks of a checkpoint in tensors that a protection changes."""
    matrices = [
        name
        for name in changed
        if name in source.index.entries
        and len(source.spec(name).shape) > 1
        and NUMBERS <= source.spec(name).numel <= _LARGEST_TENSOR
        and torch_dtype(source.spec(name).dtype).is_floating_point
    ]
    step = max(1, len(matrices) // TENSORS)
    return {name: _entries(source.tensor(name)).tolist() for name in matrices[::step][:TENSORS]}


def are_marks_of(marks: Marks, tensor: Callable[[str], Tensor]) -> bool:
    """Whether tensors by name have these marks."""
    expected = torch.tensor([list(values) for values in marks.values()], dtype=torch.float64)
    found = torch.stack([_entries(tensor(name)) for name in marks])
    return bool(torch.linalg.vector_norm(found - expected) <= LARGEST_DISTANCE * torch.linalg.vector_norm(expected))


def _entries(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:: tensor.numel() // NUMBERS][:NUMBERS].double()
