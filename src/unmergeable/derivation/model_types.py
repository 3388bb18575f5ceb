"""The map of one ``model_type``: two sizes built, derived and put into one table."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unmergeable.architecture.blocks import Attention
from unmergeable.architecture.derived import DerivedMap
from unmergeable.derivation.build import Specimen, build, default_config, registered
from unmergeable.derivation.derive import Derivation, derive
from unmergeable.derivation.shrink import OTHER, SMALL, WIDE, Sizes, filled, shrunken
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
    first = _derived(config, kind, SMALL)
    try:
        derived = tabulate(model_type, network_class, first, _derived(config, kind, OTHER))
    except UnsupportedArchitecture:
        return tabulate(model_type, network_class, first, _derived(config, kind, WIDE))
    is_whole = len(derived.attentions) > 0 or not any(isinstance(block, Attention) for block in first[1].blocks)
    return derived if is_whole else tabulate(model_type, network_class, first, _derived(config, kind, WIDE))


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
