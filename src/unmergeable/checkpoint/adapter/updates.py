r"""What an adapter does to one tensor of its base: low-rank products, and what peft's other kinds store instead.

    LoRA, VeRA   W' = W + s B A                       B: [out, r]  A: [r, in]       (arXiv:2106.09685, arXiv:2310.11454)
    DoRA         W' = m (W + s B A) / ||W + s B A||   norms of the rows [in], m: [out]              (arXiv:2402.09353)
    LoHa         W' = W + s (B_1 A_1) * (B_2 A_2)     entry by entry                                (arXiv:2108.06098)
    LoKr         W' = W + s C (x) (B A)               a Kronecker product                           (arXiv:2309.14859)

Everything is computed in float64, in blocks of rows, and rounded once to the dtype of W. A weight that is stored
transposed (GPT-2's Conv1D, embeddings) is worked on through its transpose; of a kernel all axes but the first count as
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Read = Callable[[str], Tensor]
"""The adapter's tensor of a key."""

BLOCK_ELEMENTS = 1 << 21
"""16 MB of float64."""


class Update(Protocol):
    """A change of one tensor. ``module`` is whose, as messages name it."""

    @property
    def module(self) -> str: ...

    def apply(self, weight: Tensor, read: Read) -> None:
        """Change ``weight`` in place; its shape was checked against the adapter's when it was matched."""
        ...


def add_low_rank(weight: Tensor, left: Tensor, right: Tensor, scale: float, *, magnitude: Tensor | None = None) -> None:
    """Add ``scale * left @ right`` to ``weight`` in place: float64, in blocks of rows, rounded once.

    Args:
        weight: [n, m], of any strides.
        left: [n, r].
        right: [r, m].
        scale: the factor.
        magnitude: [n], the norms that the rows of the sum are given; None leaves them as they are.
    """
    right = right.double()
    for rows in _blocks(weight):
        total = torch.addmm(weight[rows].double(), left[rows].double(), right, alpha=scale)
        if magnitude is not None:
            total *= (magnitude[rows].double() / torch.linalg.vector_norm(total, dim=1))[:, None]
        weight[rows].copy_(total)


def _blocks(weight: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for begin in range(0, weight.shape[0], rows):
        yield slice(begin, begin + rows)


@dataclass(frozen=True)
class LowRank:
    """``scale B A``, or DoRA's with a ``key_magnitude``; the keys are the adapter's.

    ``is_transposed`` says that the weight stores the transpose. ``key_energy`` is of AdaLoRA's diagonal, [r, 1].
    """

    module: str
    key_a: str
    key_b: str
    scale: float
    is_transposed: bool = False
    key_magnitude: str | None = None
    key_energy: str | None = None

    def apply(self, weight: Tensor, read: Read) -> None:
        a, b = (read(key) for key in (self.key_a, self.key_b))
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        if self.key_energy is not None:
            a = a.double() * read(self.key_energy).double()
        magnitude = None if self.key_magnitude is None else read(self.key_magnitude).flatten()
        flat = weight.view(weight.shape[0], -1)
        add_low_rank(flat.T if self.is_transposed else flat, b, a, self.scale, magnitude=magnitude)


@dataclass(frozen=True)
class Experts:
    """A product for each expert of a stacked parameter: B_e A_e to ``weight[e]`` (to its transpose, if transposed).

    peft stores A as [experts r, in], expert by expert, and B as [out, r experts], the experts running fastest. Where
    the file stores an expert, or a part of one, as a tensor of its own, ``expert``, ``rows`` and ``columns`` say which
    part of [out, in] this is; None is all.
    """

    module: str
    key_a: str
    key_b: str
    scale: float
    experts: int
    is_transposed: bool = False
    expert: int | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    def apply(self, weight: Tensor, read: Read) -> None:
        a, b = read(self.key_a), read(self.key_b)
        a = a.reshape(self.experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, self.experts).permute(2, 0, 1)
        chosen = range(self.experts) if self.expert is None else (self.expert,)
        for place, expert in zip(weight if self.expert is None else (weight,), chosen, strict=True):
            left = b[expert] if self.rows is None else b[expert][self.rows]
            right = a[expert] if self.columns is None else a[expert][:, self.columns]
            add_low_rank(place.T if self.is_transposed else place, left, right, self.scale)


@dataclass(frozen=True)
class Shared:
    """VeRA: random A and B shared by all modules, cut to a module's size and scaled by its two vectors."""

    module: str
    key_a: str
    key_b: str
    key_rank: str
    key_rows: str
    is_transposed: bool = False

    def apply(self, weight: Tensor, read: Read) -> None:
        oriented = weight.T if self.is_transposed else weight
        rows, columns = oriented.shape
        a = read(self.key_rank).double()[:, None] * read(self.key_a)[:, :columns].double()
        b = read(self.key_rows).double()[:, None] * read(self.key_b)[:rows].double()
        add_low_rank(oriented, b, a, 1.0)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: the product, entry by entry, of two products; ``keys`` by the names peft gives them (w1_a …)."""

    module: str
    keys: Mapping[str, str]
    scale: float

    def apply(self, weight: Tensor, read: Read) -> None:
        b1, a1, b2, a2 = (read(self.keys[name]).double() for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        flat = weight.view(weight.shape[0], -1)
        for rows in _blocks(flat):
            product = (b1[rows] @ a1) * (b2[rows] @ a2)
            flat[rows].copy_(flat[rows].double() + self.scale * product)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: the Kronecker product of two matrices, each stored whole (w1) or as a product (w1_a w1_b)."""

    module: str
    keys: Mapping[str, str]
    scale: float

    def apply(self, weight: Tensor, read: Read) -> None:
        first, second = (self._factor(name, read) for name in ("w1", "w2"))
        flat = weight.view(weight.shape[0], -1)
        height = second.shape[0]
        for number, row in enumerate(first):
            rows = flat[number * height : (number + 1) * height]
            rows.copy_(rows.double() + self.scale * torch.kron(row[None], second.reshape(height, -1)))

    def _factor(self, name: str, read: Read) -> Tensor:
        if name in self.keys:
            return read(self.keys[name]).double()
        return read(self.keys[f"{name}_a"]).double() @ read(self.keys[f"{name}_b"]).double()


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that were trained: the rows ``indices`` become those of ``key``, in order."""

    module: str
    key: str
    indices: tuple[int, ...]

    def apply(self, weight: Tensor, read: Read) -> None:
        weight[list(self.indices)] = read(self.key).to(weight.dtype)


@dataclass(frozen=True)
class Bias:
    """The bias of B, which peft adds to the module's own with B's factor."""

    module: str
    key: str
    scale: float

    def apply(self, weight: Tensor, read: Read) -> None:
        weight.copy_(weight.double() + self.scale * read(self.key).double())
