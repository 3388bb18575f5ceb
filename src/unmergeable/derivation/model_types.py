"""The map of one ``model_type``: two sizes built, derived and put into one table."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unmergeable.architecture.blocks import Attention
from unmergeable.architecture.declare import Names
from unmergeable.architecture.derived import DerivedMap, architecture_of
from unmergeable.architecture.rules import tensor_extents
from unmergeable.derivation.build import Specimen, build, default_config, registered
from unmergeable.derivation.derive import Derivation, derive
from unmergeable.derivation.probe import Disk
from unmergeable.derivation.prove import TOLERANCE, Prover
from unmergeable.derivation.shrink import OTHER, SMALL, UNSEEN, WIDE, Sizes, filled, shrunken
from unmergeable.derivation.table import tabulate
from unmergeable.errors import UnsupportedArchitecture


def derive_map(model_type: str, network_class: str, config: Mapping[str, Any] | None = None) -> DerivedMap:
    """The proven map of networks of ``network_class`` with the flags of ``config`` (transformers' own by default).

    Raises:
        UnsupportedArchitecture: no small network of this kind can be built or run.
    """
    transformers = importlib.import_module("transformers")
    kind = getattr(transformers, network_class)
    if config is None:
        same = kind.config_class.model_type == model_type
        config = default_config(model_type) if same else kind.config_class().to_dict()
    derived = _tabulated(model_type, kind, config)
    if not (derived.attentions or derived.feed_forwards):
        reason = next(iter(derived.reasons.values()), "it has no attention or feed-forward of a known form")
        raise UnsupportedArchitecture(f"{model_type}: no change of basis could be proven ({reason}).")
    confirm(derived, _built(config, kind, UNSEEN))
    return derived


def _tabulated(model_type: str, kind: Any, config: Mapping[str, Any]) -> DerivedMap:
    first, name = _derived(config, kind, SMALL), kind.__name__
    try:
        derived = tabulate(model_type, name, first, _derived(config, kind, OTHER))
    except UnsupportedArchitecture:
        return tabulate(model_type, name, first, _derived(config, kind, WIDE))
    is_whole = len(derived.attentions) > 0 or not any(isinstance(block, Attention) for block in first[1].blocks)
    return derived if is_whole else tabulate(model_type, name, first, _derived(config, kind, WIDE))


def confirm(derived: DerivedMap, specimen: Specimen) -> None:
    """Read a map back for a network of sizes it was not made from, and prove every group at once.

    Raises:
        UnsupportedArchitecture: the map does not fit, or changes the network's outputs.
    """
    disk = Disk(specimen.network)
    prover = Prover(specimen, disk)
    names = Names({name: tuple(tensor.shape) for name, tensor in prover.weights.items()})
    symmetry = architecture_of(derived, specimen.config, names).symmetry
    for name, axes in tensor_extents(symmetry).items():
        if any(names.shapes[name][axis] != extent for axis, extent in axes.items()):
            raise UnsupportedArchitecture(f"{derived.model_type}: the map's formulas do not give the shape of {name}.")
    change = prover.together(symmetry, symmetry.select("query_key", "value_output", "heads", "feed_forward"))
    if change > TOLERANCE:
        raise UnsupportedArchitecture(f"{derived.model_type}: read back for other sizes, the map changes outputs.")


def _derived(config: Mapping[str, Any], kind: Any, sizes: Sizes) -> tuple[Specimen, Derivation]:
    specimen = _built(config, kind, sizes)
    return specimen, derive(specimen)


def _built(config: Mapping[str, Any], kind: Any, sizes: Sizes) -> Specimen:
    """The first that can be built and run: keys shared between queries or not, settings left open filled in or not."""
    alone = replace(sizes, groups=sizes.heads)
    tries = ((config, sizes), (config, alone), (filled(config, sizes), sizes), (filled(config, sizes), alone))
    first: UnsupportedArchitecture | None = None
    for settings, some in tries:
        try:
            return build(shrunken(settings, some), kind)
        except UnsupportedArchitecture as error:
            first = first or error
    assert first is not None
    raise first


__all__ = ["derive_map", "registered"]
