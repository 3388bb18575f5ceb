"""A checkpoint seen through gauges, a few tensors at a time: how every attack that estimates gauges reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from unmergeable.architecture import SymmetryMap
from unmergeable.checkpoint.finite import is_finite
from unmergeable.checkpoint.source import DerivedSource, TensorSource
from unmergeable.errors import BadInput
from unmergeable.gauge.act import compute_dtype, edits, origins
from unmergeable.gauge.gauge import Gauge


@dataclass(frozen=True)
class Reader:
    """``source`` under ``gauges``, applied left to right."""

    source: TensorSource
    symmetry: SymmetryMap
    gauges: tuple[Gauge, ...] = ()

    def under(self, *gauges: Gauge) -> Reader:
        """The same with more gauges."""
        return replace(self, gauges=self.gauges + tuple(gauge for gauge in gauges if gauge.spaces))

    def __call__(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, the caller's own, in the dtype they are computed in.

        Raises:
            BadInput: when one of them holds NaN or infinity.
        """
        return {name: self.read(name) for name in names}

    @cached_property
    def _edits(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return edits(self.symmetry, self.gauges)

    @cached_property
    def _origins(self) -> dict[str, str]:
        return origins(self.symmetry, self.gauges)

    def read(self, name: str) -> Tensor:
        """One tensor; see :meth:`__call__`."""
        stored = self._origins.get(name, name)
        tensor = self.source.tensor(stored)
        if tensor.is_floating_point() and not is_finite(tensor):
            raise BadInput(f"tensor {stored} of {self.source.description} holds NaN or infinity; download it again.")
        edit = self._edits.get(name)
        tensor = tensor.to(compute_dtype(tensor.dtype))
        return tensor if edit is None else edit(tensor)


@dataclass(frozen=True)
class GaugedSource(DerivedSource):
    """``original`` as ``reader`` sees it: tensors in the dtype they are computed in."""

    reader: Reader

    def tensor(self, name: str) -> Tensor:
        return self.reader.read(name)
