"""The words a family's table is written in: look a tensor up, say where its heads lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from unmergeable.architecture.blocks import (
    Attention,
    FeedForward,
    FusedExperts,
    Heads,
    Mixture,
    Position,
    QueryKeyNorm,
    ScorePart,
)
from unmergeable.architecture.symmetry import Pairing
from unmergeable.errors import UnsupportedArchitecture

Config = Mapping[str, Any]
_REQUIRED = object()

HEADS_ON_TOP = r"(score|classifier|qa_outputs|pre_classifier|pooler|lm_head|cls|v_head)\b.*"
"""Output heads of fine-tunes: no symmetry of the body touches them."""


@dataclass(frozen=True)
class Names:
    """The tensors of a checkpoint by on-disk name, with their shapes."""

    shapes: Mapping[str, tuple[int, ...]]

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def prefix(self, anchor: str, candidates: Iterable[str]) -> str:
        """The first of ``candidates`` under which the tensor ``anchor`` exists.

        Raises UnsupportedArchitecture naming the tensor looked for.
        """
        candidates = tuple(candidates)
        for candidate in candidates:
            if candidate + anchor in self.shapes:
                return candidate
        tried = ", ".join(repr(candidate + anchor) for candidate in candidates)
        raise UnsupportedArchitecture(
            f"none of the tensors {tried} is in the checkpoint; it does not hold the network its config names."
        )

    def optional(self, name: str) -> str | None:
        return name if name in self.shapes else None


def setting(config: Config, *keys: str, default: Any = _REQUIRED) -> Any:
    """The first of ``keys`` that the config sets; ``default`` else.

    Raises UnsupportedArchitecture when none is set and there is no default.
    """
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    if default is _REQUIRED:
        raise UnsupportedArchitecture(f"config.json has no {' or '.join(map(repr, keys))}; add it.")
    return default


def rope_setting(config: Config, key: str, default: Any) -> Any:
    """A rotary setting: transformers 5 keeps them in ``rope_parameters``, older files at the top."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    value = rope.get(key) if isinstance(rope, Mapping) else None
    return value if value is not None else setting(config, key, default=default)


def rows(names: Names, module: str, groups: int, size: int, members: int = 1) -> Heads:
    """Heads one after another on the rows of a ``[out, in]`` weight, members of a group side by side."""
    return Heads(f"{module}.weight", names.optional(f"{module}.bias"), 0, 0, members * size, size)


def columns(module: str, size: int, members: int = 1) -> Heads:
    """Heads one after another on the columns of an output projection (its bias is not in the heads' basis)."""
    return Heads(f"{module}.weight", None, 1, 0, members * size, size)


def split(heads: Heads, offset: int) -> Heads:
    """The same heads, starting ``offset`` coordinates later."""
    return replace(heads, offset=heads.offset + offset)


def units(names: Names, module: str, offset: int = 0) -> Heads:
    """Hidden units on the rows of a weight, and on its bias."""
    return Heads(f"{module}.weight", names.optional(f"{module}.bias"), 0, offset, 0)


def unit_columns(module: str) -> Heads:
    """Hidden units on the columns of a weight."""
    return Heads(f"{module}.weight", None, 1, 0, 0)


def score_parts(
    query: Heads, key: Heads, size: int, rotary_size: int = 0, pairing: Pairing = "half"
) -> tuple[ScorePart, ...]:
    """The score over heads of ``size`` coordinates of which the first ``rotary_size`` are rotated by position.

    Raises UnsupportedArchitecture when these are not pairs, or more than there are.
    """
    if rotary_size % 2 or not 0 <= rotary_size <= size:
        raise UnsupportedArchitecture(
            f"tensor {query.weight}: config.json implies {rotary_size} rotary coordinates in a head of {size}, which "
            "is no number of pairs; config.json and weights do not belong together."
        )
    if rotary_size == 0:
        return (ScorePart(query, key, size),)
    rotated = ScorePart(query, key, rotary_size, pairing)
    if rotary_size == size:
        return (rotated,)
    return (rotated, ScorePart(split(query, rotary_size), split(key, rotary_size), size - rotary_size))


def separate_attention(
    names: Names,
    module: str,
    projections: tuple[str, str, str, str],
    *,
    groups: int,
    size: int,
    members: int = 1,
    rotary_size: int = 0,
    pairing: Pairing = "half",
    position: Position = "none",
    norm: QueryKeyNorm | None = None,
    is_cross: bool = False,
    heads_limit: str = "",
) -> Attention:
    """Attention with one weight each for queries, keys, values and output, named in that order."""
    query, key, value, output = (f"{module}.{projection}" for projection in projections)
    return Attention(
        name=module,
        groups=groups,
        members=members,
        parts=score_parts(
            rows(names, query, groups, size, members), rows(names, key, groups, size), size, rotary_size, pairing
        ),
        value=rows(names, value, groups, size),
        output=columns(output, size, members),
        value_size=size,
        position="rotary" if rotary_size else position,
        norm=norm,
        is_cross=is_cross,
        heads_limit=heads_limit,
    )


def gated(names: Names, module: str, gate: str, up: str, down: str) -> FeedForward:
    """``down(act(gate) * up)`` with one weight each."""
    size = names.shapes.get(f"{module}.{up}.weight", (0,))[0]
    return FeedForward(
        name=module,
        size=size,
        up=units(names, f"{module}.{up}"),
        down=unit_columns(f"{module}.{down}"),
        gate=units(names, f"{module}.{gate}"),
    )


def dense_or_experts(config: Config, names: Names, module: str, gate: str, up: str, down: str) -> list[FeedForward]:
    """One gated feed-forward, or behind a router one for each expert stored as ``module.experts.E``; none if fused.

    As many experts as the config says, so that a missing one is noticed; as are stored where it does not say.
    """
    if f"{module}.gate.weight" not in names:
        return [gated(names, module, gate, up, down)]
    if _fused(names, module) is not None:
        return []
    return [gated(names, expert, gate, up, down) for expert in _experts(config, names, module, up)]


def _fused(names: Names, module: str) -> FusedExperts | None:
    """All experts in two tensors, as transformers 5 holds them in memory."""
    fused = FusedExperts(f"{module}.experts.gate_up_proj", f"{module}.experts.down_proj")
    return fused if fused.up in names else None


def _experts(config: Config, names: Names, module: str, up: str) -> list[str]:
    fused = _fused(names, module)
    stored = 0 if fused is None else names.shapes[fused.up][0]
    while f"{module}.experts.{stored}.{up}.weight" in names:
        stored += 1
    count = int(setting(config, "num_local_experts", "num_experts", "n_routed_experts", default=stored))
    return [f"{module}.experts.{expert}" for expert in range(count)]


def mixtures(
    config: Config, names: Names, modules: Iterable[str], projections: tuple[str, str, str], groups: int = 1
) -> tuple[Mixture, ...]:
    """The routers among ``modules``, each with the experts that :func:`dense_or_experts` finds behind it.

    ``projections`` are gate, up and down. Raises UnsupportedArchitecture when the groups are not equal.
    """
    found = []
    for module in modules:
        if f"{module}.gate.weight" not in names:
            continue
        experts = _experts(config, names, module, projections[1])
        if len(experts) % groups:
            raise UnsupportedArchitecture(
                f"tensor {module}.gate.weight: config.json implies {len(experts)} experts in {groups} groups, which "
                "are not equal; config.json and weights do not belong together."
            )
        parts = [f"{projection}.{kind}" for projection in projections for kind in ("weight", "bias")]
        stored = [part for part in parts if experts and f"{experts[0]}.{part}" in names]
        found.append(
            Mixture(
                name=module,
                router=f"{module}.gate.weight",
                router_bias=names.optional(f"{module}.gate.e_score_correction_bias"),
                experts=tuple(experts),
                stacks=tuple(tuple(f"{expert}.{part}" for expert in experts) for part in stored),
                groups=groups,
                fused=_fused(names, module),
            )
        )
    return tuple(found)


def plain(names: Names, name: str, up: str, down: str, activation: str) -> FeedForward:
    """``down(act(up))`` with ``[out, in]`` weights; ``up`` and ``down`` are full module names."""
    size = names.shapes.get(f"{up}.weight", (0,))[0]
    return FeedForward(
        name=name,
        size=size,
        up=units(names, up),
        down=unit_columns(down),
        activation="relu" if activation == "relu" else "other",
    )
