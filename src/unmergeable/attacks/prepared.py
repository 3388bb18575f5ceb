"""What every attacker does with a release before anything else: take out what the network never sees.

    not finite    NaN and infinity, which only stand where nothing is read (the network would give out nothing else):
                  the base's numbers, or zeros where the base has no such tensor
    scales        one number by which a whole stream was multiplied before its norms: the base's
                  (:mod:`unmergeable.gauge.normed_scales`)

A release without either is what it was, the same object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unmergeable.architecture import detect
from unmergeable.attacks.base import Finding, Inputs, Recovered
from unmergeable.checkpoint.finite import is_finite
from unmergeable.checkpoint.source import DerivedSource, TensorSource
from unmergeable.errors import BadInput, UnsupportedArchitecture
from unmergeable.gauge.normed_scales import Rescaled, as_in_base


@dataclass(frozen=True)
class FiniteSource(DerivedSource):
    """``original`` with the numbers of ``base`` where it holds NaN or infinity in ``holed``."""

    base: TensorSource
    holed: frozenset[str]

    def tensor(self, name: str) -> Tensor:
        tensor = self.original.tensor(name)
        if name not in self.holed:
            return tensor
        there = name in self.base.index.entries and self.base.spec(name).shape == self.spec(name).shape
        filling = self.base.tensor(name).to(tensor.dtype) if there else torch.zeros_like(tensor)
        return torch.where(tensor.isfinite(), tensor, filling)


@dataclass(frozen=True)
class Prepared:
    """``inputs`` to attack, with what had to be ``found`` and done first."""

    inputs: Inputs
    found: Mapping[str, Finding] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)

    def finished(self, recovered: Recovered) -> Recovered:
        """What the attack made of it, with the findings and the changes of the config that came first."""
        if not self.found:
            return recovered
        changes = {**self.changes, **(recovered.config_changes or {})} or None
        return replace(recovered, findings={**self.found, **recovered.findings}, config_changes=changes)


def prepared(inputs: Inputs) -> Prepared:
    """Inputs without what the network does not see."""
    release, found = inputs.protected, dict[str, Finding]()
    holed = frozenset(name for name in release.names if not _is_sound(release, name))
    if holed:
        release = FiniteSource(release, inputs.base, holed)
        found["not_finite"] = ", ".join(sorted(holed))
    scaled = _scaled(release, inputs.base)
    if scaled is not None:
        release = scaled
        found["scales"] = ", ".join(f"{name}: {factor:.3g}" for name, factor in scaled.found.items())
    if not found:
        return Prepared(inputs)
    return Prepared(replace(inputs, protected=release), found, {} if scaled is None else scaled.changes)


def _is_sound(source: TensorSource, name: str) -> bool:
    tensor = source.tensor(name)
    return not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2 or is_finite(tensor)


def _scaled(release: TensorSource, base: TensorSource) -> Rescaled | None:
    """None also where nothing is known of what the release computes."""
    try:
        architecture = detect(release.config, {name: release.spec(name).shape for name in release.names})
    except (UnsupportedArchitecture, BadInput):
        return None
    return as_in_base(release, base, architecture)
