"""Attacks as functions of state dicts: the same arithmetic as on files, without any.

    fit = unmergeable.attacks.nearest_orbit(protected, base, config)
    fit.state_dict, fit.distance, fit.confidence

Every attack on weights has such a function, named as the method and made by :func:`in_memory` from its settings, so
that it takes them as keywords. Attacks that train have functions of a live network and a task in their own files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from torch import Tensor, nn

from unmergeable.architecture import detect
from unmergeable.attacks.base import Attack, Estimate, Finding, Fit, Inputs
from unmergeable.attacks.distance import Distance, block_distances
from unmergeable.attacks.estimate import GaugeAttack
from unmergeable.attacks.prepared import in_words_of, prepared
from unmergeable.checkpoint.memory import MemorySource, written_in_memory
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import UsageError
from unmergeable.network.disk_weights import Weights, weights_of
from unmergeable.settings import configure

Config = Mapping[str, Any]
"""What ``config.json`` holds."""

Settings = ParamSpec("Settings")
ResultType = TypeVar("ResultType", covariant=True)


@dataclass(frozen=True)
class RecoveredWeights:
    """What an attack made of weights in memory.

    Attributes:
        state_dict: by names on disk, in the stored dtypes. Tensors that did not change are those that were given.
        config: of the network that these weights belong to.
        findings: numbers the attack found in the weights, by name.
    """

    state_dict: dict[str, Tensor]
    config: Config
    findings: Mapping[str, Finding]


@dataclass(frozen=True)
class OrbitFit(RecoveredWeights):
    """What an attack that only changes bases made of weights; distances are relative Frobenius norms.

    ``estimate`` holds the gauges that were applied.
    """

    estimate: Estimate

    @property
    def distance(self) -> float:
        """To the base, over all weights that were fitted: ||W - W_base|| / ||W_base||."""
        return self.estimate.after

    @property
    def distance_before(self) -> float:
        """The same for the weights as they were given."""
        return self.estimate.before

    @property
    def confidence(self) -> float:
        """From 0, what fitting an unrelated base gives, to 1, the base itself."""
        return self.estimate.confidence

    @property
    def parts(self) -> tuple[Fit, ...]:
        """The fit of every part of a block."""
        return self.estimate.fits


class AttackFunction(Protocol[Settings, ResultType]):
    """An attack on weights in memory, whose further keywords are the settings of the method."""

    def __call__(
        self,
        protected: Weights,
        base: Weights,
        config: Config | None = None,
        base_config: Config | None = None,
        sources: Sequence[Weights] = (),
        *values: Settings.args,
        **settings: Settings.kwargs,
    ) -> ResultType:
        """Attack ``protected`` with what is given.

        Args:
            protected: the release (for ``unmask`` a merge); never changed.
            base: what it was fine-tuned from, by the same names.
            config: of ``protected``; that of the network where it is one.
            base_config: of ``base``, where its structure is another (a release whose layers were replaced).
            sources: other checkpoints, for methods that read them.
            values: none; settings are given by name.
            settings: of the method.

        Raises:
            UsageError: a setting is unknown or makes no sense, a source is missing or not read, or there is no config.
            UnsupportedArchitecture: there is no symmetry map for the config.
            Mismatch: ``base`` is not the base of ``protected``.
            BadInput: weights hold NaN or infinity.
        """
        ...


def in_memory(method: Callable[Settings, Attack]) -> AttackFunction[Settings, RecoveredWeights]:
    """The function of state dicts that carries out an attack on weights."""

    def attack(
        protected: Weights,
        base: Weights,
        config: Config | None = None,
        base_config: Config | None = None,
        sources: Sequence[Weights] = (),
        **settings: Any,
    ) -> RecoveredWeights:
        cls = cast(type[Attack], method)
        configured = configure(cls, settings)
        if sources and "sources" not in configured.requirements().reads:
            raise UsageError(f"{cls.name} reads no sources: leave them out.")
        given = _source("protected", protected, config)
        theirs = _source("base", base, base_config or (None if isinstance(base, nn.Module) else given.config))
        others = tuple(_source(f"source {n}", other, given.config) for n, other in enumerate(sources, start=1))
        ours = in_words_of(theirs, given)
        is_changed = configured.requirements().structure == "any"
        inputs = Inputs(ours, theirs, _architecture(theirs if is_changed else ours), others)
        first = prepared(inputs)
        recovered = first.finished(configured.recover(first.inputs))
        state = written_in_memory(recovered.template, recovered.plan(inputs.architecture))
        changed = {**recovered.template.config, **(recovered.config_changes or {})}
        if recovered.estimate is None:
            return RecoveredWeights(state, changed, recovered.findings)
        return OrbitFit(state, changed, recovered.findings, recovered.estimate)

    attack.__name__ = attack.__qualname__ = cast(type[Attack], method).name
    attack.__doc__ = AttackFunction.__call__.__doc__
    return cast(AttackFunction[Settings, RecoveredWeights], attack)


def fit_in_memory(method: Callable[Settings, GaugeAttack]) -> AttackFunction[Settings, OrbitFit]:
    """As :func:`in_memory`, for an attack that estimates gauges."""
    return cast(AttackFunction[Settings, OrbitFit], in_memory(method))


def distances(checkpoint: Weights, base: Weights, config: Config | None = None) -> tuple[Distance, ...]:
    """How far each part of each block is from the base, as stored: see :mod:`unmergeable.attacks.distance`.

    Args and errors as in :meth:`AttackFunction.__call__`.
    """
    source = _source("checkpoint", checkpoint, config)
    return block_distances(source, _source("base", base, source.config), _architecture(source))


def _architecture(source: TensorSource) -> Any:
    return detect(source.config, {name: source.spec(name).shape for name in source.names})


def _source(name: str, weights: Weights, config: Config | None) -> MemorySource:
    if not isinstance(weights, nn.Module):
        if config is None:
            raise UsageError(f"{name}: a state dict comes without its config; give it as config=.")
        return MemorySource(weights, config, Path(name))
    if config is None:
        network_config = getattr(weights, "config", None)
        if network_config is None:
            raise UsageError(f"{name}: {type(weights).__name__} has no config; give it as config=.")
        config = network_config.to_dict() if hasattr(network_config, "to_dict") else dict(network_config)
    return MemorySource(weights_of(weights), config, Path(name))
