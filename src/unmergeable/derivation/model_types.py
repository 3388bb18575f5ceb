"""The map of one ``model_type``: two sizes built, derived and put into one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from unmergeable.architecture.blocks import Attention
from unmergeable.architecture.declare import Names
from unmergeable.architecture.derived import DerivedMap, architecture_of, flags_of
from unmergeable.architecture.parts import is_of_a_tower
from unmergeable.architecture.rules import possible_lengths
from unmergeable.architecture.symmetry import Role
from unmergeable.derivation.attentions import NOT_UNDERSTOOD
from unmergeable.derivation.build import (
    TASKS,
    VARIANTS,
    Specimen,
    build,
    class_named,
    default_config,
    is_diffusion,
    registered,
    varied,
)
from unmergeable.derivation.derive import NO_ATTENTION, Derivation, derive, without_numbers
from unmergeable.derivation.probe import Disk
from unmergeable.derivation.prove import TOLERANCE, Prover
from unmergeable.derivation.shrink import OTHER, PARTIAL, SMALL, UNSEEN, WIDE, Sizes, filled, shrunken, supply
from unmergeable.derivation.table import tabulate
from unmergeable.errors import UnsupportedArchitecture

ROLES: tuple[Role, ...] = ("query_key", "value_output", "heads", "feed_forward", "experts")

MISSING = 4
"""How many settings a class may read that its config lacks."""


def derive_map(model_type: str, network_class: str, config: Mapping[str, Any] | None = None) -> DerivedMap:
    """The proven map of networks of ``network_class`` with the flags of ``config`` (transformers' own by default).

    Raises:
        UnsupportedArchitecture: no small network of this kind can be built or run.
    """
    kind = class_named(network_class)
    if config is None:
        usual = usual_config(model_type, kind)
        derived = derive_map(model_type, network_class, usual)
        for settings in VARIANTS.get(model_type, ()):
            variant = varied(usual, settings)
            derived = with_variant(derived, derive_map(model_type, network_class, variant), settings, usual)
            for each in (usual, variant):
                confirm(derived, built(each, kind, UNSEEN))
        return derived
    derived = _tabulated(model_type, kind, config)
    if not (derived.attentions or derived.feed_forwards):
        tried = next(iter(derived.reasons.values()), "it has no attention or feed-forward of a known form")
        reason = derived.reasons.get(NO_ATTENTION, tried)
        raise UnsupportedArchitecture(f"{model_type}: no change of basis could be proven ({reason}).")
    return widened(confirmed(derived, built(config, kind, UNSEEN)))


def with_variant(
    derived: DerivedMap, variant: DerivedMap, settings: Mapping[str, Any], usual: Mapping[str, Any]
) -> DerivedMap:
    """One map for networks with the ``usual`` settings and for those with other ``settings``.

    A block that is not the same in both says with which it is which.
    """
    # What tells two kinds of networks apart is one for all layers.
    told = {name: value for name, value in _dotted(settings).items() if not isinstance(value, (list, tuple))}
    own_settings = _dotted(usual)
    before = {name: [own_settings.get(name), None] for name in told}  # None: a file may leave out what is usual

    def both(own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        theirs = {str(template["name"]): template for template in other}
        found: list[Mapping[str, Any]] = []
        for template in own:
            twin = theirs.pop(str(template["name"]), None)
            if twin is None:  # no tensor of it is in the other network
                found.append(template)
                continue
            template, twin = _with_biases_of(template, twin), _with_biases_of(twin, template)
            is_same = template == twin
            found += [template] if is_same else [{**template, "when": before}, {**twin, "when": told}]
        return (*found, *theirs.values())

    flags = dict(derived.flags)
    flags |= {name: _either(flags.get(name, value), value) for name, value in variant.flags.items()}
    return replace(
        derived,
        attentions=both(derived.attentions, variant.attentions),
        feed_forwards=both(derived.feed_forwards, variant.feed_forwards),
        flags=flags,
        defaults={**variant.defaults, **derived.defaults},
        known=tuple(sorted({*derived.known, *variant.known})),
        reasons={**variant.reasons, **derived.reasons},
        proof={**derived.proof, "variants": [*derived.proof.get("variants", ()), {**settings, "proof": variant.proof}]},
    )


def _dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _with_biases_of(template: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """A template with the biases of another that has the same weights; a checkpoint may do without."""
    if template.get("weight") != other.get("weight") or template.keys() - other.keys() - {"bias"}:
        return template
    found = dict(template)
    for name, value in other.items():
        if name == "bias" and "bias" not in template:
            found[name] = value
        elif isinstance(value, Mapping) and isinstance(template.get(name), Mapping):
            found[name] = _with_biases_of(template[name], value)
        elif name == "parts" and len(value) == len(template.get(name, ())):
            found[name] = [_with_biases_of(own, one) for own, one in zip(template[name], value, strict=True)]
    return found


def usual_config(model_type: str, kind: Any) -> Mapping[str, Any]:
    """The config that a network class has when nothing is set, but for towers: it has those that it may be without."""
    if is_diffusion(kind):
        return default_config(model_type)
    is_own = kind.config_class.model_type == model_type
    usual = default_config(model_type) if is_own else dict(kind.config_class().to_dict())
    for name, part in getattr(kind.config_class, "sub_configs", {}).items():
        if usual.get(name, 0) is None and is_of_a_tower(name) and hasattr(part, "model_type"):
            usual[name] = part().to_dict()
    return usual


def _tabulated(model_type: str, kind: Any, config: Mapping[str, Any]) -> DerivedMap:
    first, name = _derived(config, kind, SMALL), kind.__name__
    attentions = [block for block in first[1].blocks if isinstance(block, Attention)]
    scored = {without_numbers(block.name) for block in attentions if block.parts}
    best: DerivedMap | None = None
    failure: UnsupportedArchitecture | None = None
    for sizes in (OTHER, WIDE, PARTIAL):
        try:
            derived = tabulate(model_type, name, first, _derived(config, kind, sizes))
        except UnsupportedArchitecture as error:
            failure = error
            continue
        if best is None or _extent(derived) > _extent(best):
            best = derived
        if (len(best.attentions) > 0 or not attentions) and _extent(best)[1] >= len(scored):
            break
    if best is None:
        assert failure is not None
        raise failure
    return best


def _extent(derived: DerivedMap) -> tuple[int, int]:
    """How many attentions a map has, and how many with queries and keys."""
    return len(derived.attentions), sum(bool(template["parts"]) for template in derived.attentions)


def confirmed(derived: DerivedMap, specimen: Specimen) -> DerivedMap:
    """A map without the blocks that are refused for a network of sizes it was not made from.

    Raises:
        UnsupportedArchitecture: nothing is left of it.
    """
    try:
        confirm(derived, specimen)
    except UnsupportedArchitecture:
        reasons = dict(derived.reasons)
        bare = replace(derived, attentions=(), feed_forwards=())
        attentions = [
            found
            for template in derived.attentions
            if (found := _first_confirmed("attentions", (template, _unscored(template)), bare, specimen, reasons))
        ]
        feed_forwards = [
            found
            for template in derived.feed_forwards
            if (found := _first_confirmed("feed_forwards", (template,), bare, specimen, reasons))
        ]
        if not (attentions or feed_forwards):
            raise
        derived = replace(derived, attentions=tuple(attentions), feed_forwards=tuple(feed_forwards), reasons=reasons)
        confirm(derived, specimen)
    return derived


def _first_confirmed(
    role: str, templates: tuple[Mapping[str, Any], ...], bare: DerivedMap, specimen: Specimen, reasons: dict[str, str]
) -> Mapping[str, Any] | None:
    """The first of some templates that is confirmed by itself; what speaks against the others goes to ``reasons``."""
    for template in templates:
        try:
            confirm(replace(bare, **{role: (template,)}), specimen)  # type: ignore[arg-type]
        except UnsupportedArchitecture as error:
            reasons.setdefault(str(template["name"]), str(error).removeprefix(f"{bare.model_type}: "))
        else:
            return template
    return None


def _unscored(template: Mapping[str, Any]) -> dict[str, Any]:
    """An attention whose queries and keys are left alone; the places of values may be given in their sizes."""
    sizes = {f"part_{index}": str(part["size"]) for index, part in enumerate(template["parts"])}
    plain = {name: size for name, size in sizes.items() if " " not in size}

    def spelled_out(heads: Mapping[str, Any]) -> dict[str, Any]:
        formulas = ("offset", "group_stride", "member_stride")
        return {
            key: " ".join(plain.get(word, word) for word in str(value).split()) if key in formulas else value
            for key, value in heads.items()
        }

    limit = template["heads_limit"] or NOT_UNDERSTOOD
    unknown: dict[str, Any] = {"parts": [], "position": "none", "heads_limit": limit}
    sides: dict[str, Any] = {side: spelled_out(template[side]) for side in ("value", "output")}
    if "joined" in template:
        streams = [
            {side: spelled_out(stream[side]) for side in ("value", "output") if side in stream}
            for stream in template["joined"]
        ]
        sides["joined"] = [{"queries": [], "keys": [], **stream} for stream in streams]
    return {name: value for name, value in {**template, **unknown, **sides}.items() if name != "norm"}


def confirm(derived: DerivedMap, specimen: Specimen) -> None:
    """Read a map back for a network of sizes it was not made from, and prove every group at once.

    Raises:
        UnsupportedArchitecture: the map does not fit, or changes the network's outputs.
    """
    disk = Disk(specimen.network)
    prover = Prover(specimen, disk)
    names = Names({name: tuple(tensor.shape) for name, tensor in prover.weights.items()})
    symmetry = architecture_of(derived, specimen.config, names).symmetry
    for name, axes in possible_lengths(symmetry).items():
        if name not in names.shapes or any(names.shapes[name][axis] not in lengths for axis, lengths in axes.items()):
            raise UnsupportedArchitecture(f"{derived.model_type}: the map's formulas do not give the shape of {name}.")
    change = prover.together(symmetry, symmetry.select(*ROLES))
    if change > TOLERANCE:
        raise UnsupportedArchitecture(f"{derived.model_type}: read back for other sizes, the map changes outputs.")


def widened(derived: DerivedMap) -> DerivedMap:
    """The map with the flags of every other network class of its type, of those that are registered for a task.

    A decoder that may be had without its encoder says so in a flag; the map is proven on either. Classes that cannot be
    built, or on which the map does not hold, leave it as it is.
    """
    flags, known, also = dict(derived.flags), set(derived.known), []
    for name in other_classes(derived):
        kind = class_named(name)
        try:
            specimen = built(usual_config(derived.model_type, kind), kind, UNSEEN)
            own = flags_of(specimen.config)
            confirm(replace(derived, flags=own), specimen)
        except UnsupportedArchitecture:
            continue
        flags |= {flag: _either(flags.get(flag, value), value) for flag, value in own.items()}
        known |= {without_numbers(tensor) for tensor in specimen.stored_names()}
        also.append(name)
    proof = {**derived.proof, **({"also": also} if also else {})}
    return replace(derived, flags=flags, known=tuple(sorted(known)), proof=proof)


def other_classes(derived: DerivedMap) -> list[str]:
    """Classes of a map's type, other than its own, that are registered for a task and read the same settings."""
    own = class_named(derived.network_class)
    names = dict.fromkeys(registered(task).get(derived.model_type, derived.network_class) for task in TASKS)
    found = {name: class_named(name) for name in names if name != derived.network_class and not is_diffusion(own)}
    return [name for name, kind in found.items() if kind is not None and kind.config_class is own.config_class]


def _either(first: Any, second: Any) -> Any:
    """Both of two flags, as one where they are the same."""
    values = [*(first if isinstance(first, list) else [first]), *(second if isinstance(second, list) else [second])]
    return first if first == second else sorted(set(values), key=str)


def _derived(config: Mapping[str, Any], kind: Any, sizes: Sizes) -> tuple[Specimen, Derivation]:
    specimen = built(config, kind, sizes)
    return specimen, derive(specimen)


def built(config: Mapping[str, Any], kind: Any, sizes: Sizes) -> Specimen:
    """A small network, the first that runs: keys shared between queries or not, settings left open filled in or not.

    Raises:
        UnsupportedArchitecture: none can be built and run.
    """
    alone = replace(sizes, groups=sizes.heads)
    tries = ((config, sizes), (config, alone), (filled(config, sizes), sizes), (filled(config, sizes), alone))
    first: UnsupportedArchitecture | None = None
    for settings, some in tries:
        small = shrunken(settings, some)
        for _ in range(MISSING):
            try:
                return build(small, kind)
            except UnsupportedArchitecture as error:
                first = first or error
                if not supply(small, error.__cause__, some):
                    break
    assert first is not None
    raise first


__all__ = ["built", "derive_map", "registered", "usual_config"]
