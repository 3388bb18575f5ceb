"""Inner products of whole task vectors, one tensor of every checkpoint in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput

CHUNK_ELEMENTS = 1 << 22
"""Numbers of each checkpoint held in float64 at a time."""


def common_tensors(sources: Sequence[TensorSource]) -> list[str]:
    """Floating-point tensors that all hold in one shape, in the order of the first."""
    held = [set(source.names) for source in sources]
    first = sources[0]
    return [
        name
        for name in first.names
        if torch_dtype(first.spec(name).dtype).is_floating_point
        and all(name in names for names in held)
        and len({source.spec(name).shape for source in sources}) == 1
    ]


def inner_products(sources: Sequence[TensorSource], base: TensorSource, name: str) -> Tensor:
    """Gram matrix of (source - base) in tensor ``name``, and of the base in the last row: float64 [n + 1, n + 1].

    Raises:
        BadInput: when one of them holds NaN or infinity there.
    """
    gram = torch.zeros(len(sources) + 1, len(sources) + 1, dtype=torch.float64)
    for chunks in _chunks([*sources, base], name):
        theirs = chunks[-1]
        rows = torch.stack([*(chunk - theirs for chunk in chunks[:-1]), theirs])
        gram += rows @ rows.T
    if not bool(gram.isfinite().all()):
        raise BadInput(
            f"tensor {name} of {', '.join(source.description for source in [*sources, base])}: one holds NaN or "
            "infinity; download it again."
        )
    return gram


def _chunks(sources: Sequence[TensorSource], name: str) -> Iterator[list[Tensor]]:
    flat = [source.tensor(name).flatten() for source in sources]
    for start in range(0, flat[0].numel(), CHUNK_ELEMENTS):
        yield [tensor[start : start + CHUNK_ELEMENTS].double() for tensor in flat]
