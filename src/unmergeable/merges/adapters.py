r"""Merges of LoRA adapters in their own space: from products B_i A_i of one base to a product B A.

    cat                   B A = sum_i c_i B_i A_i, of rank sum r_i: exact
    svd                   the best approximation of that sum of a given rank
    linear                A = sum_i sqrt(c_i) A_i and B likewise: rough, the product of sums is no sum of products
    ties, dare_linear, dare_ties, magnitude_prune          on A and on B, as ``linear``
    ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd       on the products, then ``svd``

are peft's combination types (``add_weighted_adapter``), which the tests compare with peft; its weights of A carry the
sign of a negative c_i.

    knots_ties            [D_1 ... D_n] = U S [V_1^T ... V_n^T]; TIES on the V_i, which one U aligns (arXiv 2410.19735)
    core_linear, core_ties      D_i = U M_i V^T in bases U of all B_i and V of all A_i, without loss; what is merged are
                          the cores M_i, of size at most sum r_i                            (arXiv 2509.17786)

with D_i = c_i B_i A_i for KnOTS. ``core_linear`` is the sum, like ``cat``, at the least rank that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.randomness import Stream
from unmergeable.settings import nearest

Combination = Literal[
    "cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd", "dare_linear_svd",
    "dare_ties_svd", "magnitude_prune_svd", "knots_ties", "core_linear", "core_ties",
]  # fmt: skip
MajoritySign = Literal["total", "frequency"]


@dataclass(frozen=True)
class AdapterMerge:
    """``density``: fraction of entries that is kept, where some are dropped. ``rank`` of the result of a decomposition,
    0 for the largest of the adapters'. ``majority_sign``: by the sum of entries, or of their signs. ``seed`` of what is
    dropped at random."""

    name: Combination
    density: float = 0.2
    rank: int = 0
    majority_sign: MajoritySign = "total"
    seed: int = 0

    def validate(self) -> None:
        """Raises UsageError for a method or setting that there is not."""
        if self.name not in get_args(Combination):
            known = dict.fromkeys(get_args(Combination))
            raise UsageError(f"no merge of adapters is called {self.name!r}{nearest(self.name, known)}")
        if not 0 < self.density <= 1:
            raise UsageError(f"{self.name}: density must lie above 0 and at most be 1, not {self.density}.")
        if self.rank < 0:
            raise UsageError(f"{self.name}: rank must be at least 1, or 0 for the largest of the adapters'.")
        if self.majority_sign not in get_args(MajoritySign):
            raise UsageError(f"{self.name}: majority_sign must be total or frequency, not {self.majority_sign}.")

    def merge(
        self, factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], label: str
    ) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of the merged module, float64.

        Args:
            factors: A_i [r_i, in] and B_i [out, r_i] of every adapter that has the module.
            weights: coefficient times scale of each.
            label: of the module, for what is drawn.

        Raises:
            UsageError: ranks differ, where factors are merged one by one.
        """
        pairs = [(a.double(), b.double()) for a, b in factors]
        if self.name == "cat":
            return torch.cat([w * a for (a, _), w in zip(pairs, weights, strict=True)]), torch.cat(
                [b for _, b in pairs], 1
            )
        if self.name == "knots_ties":
            return self._knots(pairs, weights)
        if self.name in ("core_linear", "core_ties"):
            return self._core(pairs, weights, label)
        if self.name.endswith("svd"):
            entries = [b @ a for a, b in pairs]
            merged = self._of_entries(self.name.removesuffix("svd").rstrip("_") or "linear", entries, weights, label)
            return truncated(merged, self.rank or max(len(a) for a, _ in pairs))
        if len({len(a) for a, _ in pairs}) > 1:
            raise UsageError(
                f"{self.name} merges A with A and B with B, so that all ranks must be equal; use svd or cat."
            )
        roots = [math.sqrt(abs(weight)) for weight in weights]
        signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
        a = self._of_entries(self.name, [a for a, _ in pairs], signed, f"{label} A")
        return a, self._of_entries(self.name, [b for _, b in pairs], roots, f"{label} B")

    def _of_entries(self, how: str, tensors: Sequence[Tensor], weights: Sequence[float], label: str) -> Tensor:
        """One of peft's merges of tensors, entry by entry."""
        stacked = torch.stack(list(tensors))
        if how in ("ties", "magnitude_prune"):
            stacked = torch.stack([_largest(tensor, self.density) for tensor in stacked])
        if how in ("dare_linear", "dare_ties"):
            stacked = stacked * self._kept(stacked.shape, label) / self.density
        weighted = stacked * torch.tensor(list(weights), dtype=torch.float64).view(-1, *[1] * (stacked.dim() - 1))
        if how in ("ties", "dare_ties"):
            return _disjoint(stacked, weighted, self.majority_sign)
        return weighted.sum(0)

    def _kept(self, shape: torch.Size, label: str) -> Tensor:
        uniform = Stream.from_seed(self.seed).child(label).uniform(*shape)
        return torch.from_numpy(uniform < self.density)

    def _knots(self, pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """U S is common to all products side by side; TIES merges the right singular vectors that are each one's."""
        widths = [a.shape[1] for a, _ in pairs]
        # Of the products side by side, [B_1 A_1 ... ] = [B_1 ... B_n] blockdiag(A_i): decomposed at size sum r_i.
        left, upper = torch.linalg.qr(torch.cat([w * b for (_, b), w in zip(pairs, weights, strict=True)], 1))
        right, lower = torch.linalg.qr(torch.block_diag(*[a for a, _ in pairs]).T)
        u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        each = [part.T for part in (right @ vh.T).split(widths)]
        merged = _disjoint_of([_largest(vectors, self.density) for vectors in each], self.majority_sign)
        return merged, left @ u * s

    def _core(
        self, pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], label: str
    ) -> tuple[Tensor, Tensor]:
        """In bases of everything that any B writes to and any A reads, a product is a small core."""
        u = _basis(torch.cat([b for _, b in pairs], 1))
        v = _basis(torch.cat([a for a, _ in pairs]).T)
        cores = [(u.T @ b) @ (a @ v) for a, b in pairs]
        core = self._of_entries(self.name.removeprefix("core_"), cores, weights, label)
        return v.T, u @ core


def truncated(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the nearest product of this rank, the singular values in B, as peft has them."""
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    return vh[:rank], u[:, :rank] * s[:rank]


def _basis(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of ``matrix``."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > s[0] * max(matrix.shape) * torch.finfo(s.dtype).eps).sum()) if len(s) else 0
    spanning: Tensor = u[:, : max(1, rank)]
    return spanning


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The tensor with all but the ``density`` of its entries of largest magnitude set to zero."""
    if density >= 1:
        return tensor
    kept = torch.zeros_like(tensor).flatten()
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    largest: Tensor = tensor * kept.view_as(tensor)
    return largest


def _disjoint(trimmed: Tensor, weighted: Tensor, majority: MajoritySign) -> Tensor:
    """The mean of the weighted entries whose trimmed ones have the elected sign; zero counts as its own sign."""
    elected = torch.where((trimmed if majority == "total" else trimmed.sign()).sum(0) >= 0, 1, -1)
    agrees = trimmed.sign() == elected
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _disjoint_of(tensors: Sequence[Tensor], majority: MajoritySign) -> Tensor:
    stacked = torch.stack(list(tensors))
    return _disjoint(stacked, stacked, majority)
