"""What every attacker does with a release before anything else: take out what the network never sees.

    not finite    NaN and infinity, which only stand where nothing is read (the network would give out nothing else):
                  the base's numbers, or zeros where the base has no such tensor
    rows          of an embedding, far longer than any of the base's: a network that read one would see nothing else, so
                  that no text has their tokens: zeros, which say nothing of a basis
    frequencies   of rotary positions in another order, or mirrored: the base's
                  (:mod:`unmergeable.gauge.config_frequencies`)
    config        numbers that the config multiplies by: the base's, and weights that make up for it
                  (:mod:`unmergeable.gauge.config_scales`)
    scales        one number by which a whole stream was multiplied before its norms: the base's
                  (:mod:`unmergeable.gauge.normed_scales`)

One that says the same in other words than its base (:mod:`unmergeable.attacks.restated`), or in tensors of another type
of network (:mod:`unmergeable.attacks.transcription`), is opened in the base's.

A release without any of it is what it was, the same object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, detect
from unmergeable.attacks.base import Finding, Inputs, Recovered
from unmergeable.attacks.restated import Restated, restated
from unmergeable.attacks.transcription import Transcribed, transcribed
from unmergeable.checkpoint.finite import is_sound
from unmergeable.checkpoint.source import DerivedSource, TensorSource
from unmergeable.errors import BadInput, UnsupportedArchitecture
from unmergeable.gauge.config_frequencies import with_frequencies
from unmergeable.gauge.config_scales import with_config
from unmergeable.gauge.normed_scales import as_in_base

UNREAD = 16.0
"""Times the longest row of the base's embedding: what a fine-tune makes of a token stays far below."""


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
class WithoutRows(DerivedSource):
    """``original`` with zeros in some rows of embeddings, by name."""

    rows: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        tensor = self.original.tensor(name)
        if name in self.rows:
            tensor[self.rows[name]] = 0
        return tensor


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


def in_words_of(base: TensorSource, release: TensorSource) -> TensorSource:
    """A release as a network of its base's type, and without biases that add nothing and that the base has not."""
    return restated(release, base) or transcribed(release, base) or release


def prepared(inputs: Inputs) -> Prepared:
    """Inputs without what the network does not see."""
    release, found = inputs.protected, dict[str, Finding]()
    changes: dict[str, Any] = {}
    if isinstance(release, Restated | Transcribed):
        found |= release.found
        changes |= release.changes
    holed = frozenset(name for name in release.names if not is_sound(release, name))
    if holed:
        release = FiniteSource(release, inputs.base, holed)
        found["not_finite"] = ", ".join(sorted(holed))
    architecture = _architecture_of(release)
    reordered = None if architecture is None else with_frequencies(release, architecture, inputs.base.config)
    if reordered is not None:
        release, changes = reordered, changes | dict(reordered.changes)
        found["frequencies"] = reordered.found
    told = None if architecture is None else with_config(release, architecture, inputs.base.config)
    if told is not None:
        release, changes = told, changes | dict(told.changes)
        found["config_scales"] = ", ".join(f"{name}: {factor:.3g}" for name, factor in told.found.items())
    scaled = None if architecture is None else as_in_base(release, inputs.base, architecture)
    if scaled is not None:
        release, changes = scaled, changes | dict(scaled.changes)
        found["scales"] = ", ".join(f"{name}: {factor:.3g}" for name, factor in scaled.found.items())
    rows = {} if architecture is None else _rows_unread(release, inputs.base, architecture)
    if rows:
        release = WithoutRows(release, rows)
        found["rows_unread"] = sum(len(places) for places in rows.values())
    if not found:
        return Prepared(inputs)
    return Prepared(replace(inputs, protected=release), found, changes)


def _architecture_of(release: TensorSource) -> Architecture | None:
    """None where nothing is known of what the release computes."""
    try:
        return detect(release.config, {name: release.spec(name).shape for name in release.names})
    except (UnsupportedArchitecture, BadInput):
        return None


def _rows_unread(release: TensorSource, base: TensorSource, architecture: Architecture) -> dict[str, Tensor]:
    """By embedding, the rows that are longer than :data:`UNREAD` times the longest of the base."""
    found: dict[str, Tensor] = {}
    for stream in (*architecture.residuals, *architecture.exposed):
        name, axis = stream.axes[0].tensor, stream.axes[0].axis
        if axis != 1 or any(
            name not in side.index.entries or len(side.spec(name).shape) != 2 for side in (release, base)
        ):
            continue
        (ours, width), (theirs, same) = release.spec(name).shape, base.spec(name).shape
        if width == same:
            common = min(ours, theirs)
            lengths, longest = (side.tensor(name)[:common].double().norm(dim=1) for side in (release, base))
            places = (lengths > UNREAD * longest.max()).nonzero().flatten()
            if 0 < len(places) <= common / 2:
                found[name] = places
    return found
