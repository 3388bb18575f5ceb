"""Merges by singular values at many coefficients, decomposed once.

A sweep over coefficients asks for the same task matrices again and again. Of ``tsv_m`` the singular directions do not
depend on coefficients, so that its merge is a weighted sum of matrices that are computed once. ``iso_c`` depends on
them by their ratios alone: twice the coefficients are twice the merged task vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unmergeable.merges.iso_c import IsoC, flattened
from unmergeable.merges.spectral import SpectralMerge, is_matrix
from unmergeable.merges.task_vectors import TaskVectors
from unmergeable.merges.tsv_m import TsvM, merged_parts

KEPT = 4
"""Ratios of coefficients of which the merged task vector is kept, the last ones asked for."""

Sweep = Callable[[Sequence[float]], Mapping[str, Tensor]]
"""Coefficients of all experts, to merged weights."""


def sweep_of(method: SpectralMerge, vectors: TaskVectors) -> Sweep | None:
    """The merge at any coefficients, up to rounding what ``merge_state_dicts`` gives; None where that has to do it.

    Args:
        method: with its settings.
        vectors: what is merged.
    """
    if not all(bool(tensor.isfinite().all()) for vector in vectors.vectors for tensor in vector.values()):
        return None  # what is not finite has no singular values, and is refused where tensors are merged one by one
    if isinstance(method, TsvM):
        return _Directions(method, vectors).merged
    return _Flat(method, vectors).merged if isinstance(method, IsoC) else None


@dataclass
class _Directions:
    """``tsv_m``. Experts with a coefficient of 0 have no directions, and the others' are made orthogonal without."""

    method: TsvM
    vectors: TaskVectors
    _parts: dict[tuple[bool, ...], TaskVectors] = field(default_factory=dict)

    def merged(self, coefficients: Sequence[float]) -> Mapping[str, Tensor]:
        used = tuple(coefficient != 0 for coefficient in coefficients)
        if used not in self._parts:
            self._parts = {used: self._of(used)}
        return self._parts[used].merged([self.method.scaling_coefficient * c for c in coefficients])

    def _of(self, used: Sequence[bool]) -> TaskVectors:
        every = self.vectors.vectors
        parts: tuple[dict[str, Tensor], ...] = tuple({} for _ in every)
        for name in self.vectors.names:
            own = [vector[name] if is_used else vector[name] * 0 for vector, is_used in zip(every, used, strict=True)]
            made = merged_parts(own) if is_matrix(own[0]) else [tensor / len(own) for tensor in own]
            for part, tensor in zip(parts, made, strict=True):
                part[name] = tensor
        return TaskVectors(self.vectors.base, parts)


@dataclass
class _Flat:
    """``iso_c``, at coefficients whose largest is 1, and what others multiply that by."""

    method: IsoC
    vectors: TaskVectors
    _kept: dict[tuple[float, ...], TaskVectors] = field(default_factory=dict)

    def merged(self, coefficients: Sequence[float]) -> Mapping[str, Tensor]:
        largest = max(map(abs, coefficients)) or 1.0
        ratios = tuple(coefficient / largest for coefficient in coefficients)
        if ratios not in self._kept:
            kept = list(self._kept.items())[-(KEPT - 1) :]
            self._kept = {**dict(kept), ratios: self._at(ratios)}
        return self._kept[ratios].merged([self.method.scaling_coefficient * largest])

    def _at(self, ratios: Sequence[float]) -> TaskVectors:
        merged = {}
        for name in self.vectors.names:
            summed = torch.zeros_like(self.vectors.vectors[0][name])
            for vector, ratio in zip(self.vectors.vectors, ratios, strict=True):
                summed.add_(vector[name], alpha=ratio)
            merged[name] = flattened(summed) if is_matrix(summed) else summed / len(ratios)
        return TaskVectors(self.vectors.base, (merged,))
