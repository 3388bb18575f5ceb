"""Canonical weights: the point of a checkpoint's orbit that is nearest to its base.

Distances, noise and sharpness depend on the basis the weights are written in, which an exact protection chooses at
will. The nearest point of the orbit computes the same and depends on the function alone, so that figures of
differently protected models can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.attacks.nearest_orbit import NearestOrbit
from unmergeable.checkpoint.source import DerivedSource, TensorSource
from unmergeable.gauge.act import edits, origins
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class CanonicalSource(DerivedSource):
    """``original`` under changes of basis, tensor by tensor as it is read, rounded to the stored dtype."""

    edits: Mapping[str, Callable[[Tensor], Tensor]]
    origins: Mapping[str, str]

    @property
    def description(self) -> str:
        return f"{self.original.description} in the basis of its base"

    def tensor(self, name: str) -> Tensor:
        stored = self.original.tensor(self.origins.get(name, name))
        return self.edits[name](stored) if name in self.edits else stored


def canonical_source(
    source: TensorSource, base: TensorSource, architecture: Architecture, progress: Progress = silent
) -> CanonicalSource:
    """``source`` at the point of its orbit nearest to ``base``, as ``recover --method nearest_orbit`` would write it.

    Raises:
        Mismatch: the two do not hold the same tensors in attention and feed-forward.
        BadInput: one of them holds NaN or infinity.
    """
    estimate = NearestOrbit().estimate(source, base, architecture, progress)
    symmetry, gauges = architecture.symmetry, estimate.gauges
    return CanonicalSource(estimate.template or source, edits(symmetry, gauges), origins(symmetry, gauges))
