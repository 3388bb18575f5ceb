"""The small groups against exhaustive search."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmergeable.architecture import Group, Space
from unmergeable.architecture.symmetry import GroupKind, Pairing, Variance
from unmergeable.attacks.closed_forms import nearest_scale
from unmergeable.attacks.kabsch import NEAREST_ISOMETRY
from unmergeable.attacks.moments import LegPair
from unmergeable.attacks.nearest_orbit import NEAREST
from unmergeable.gauge.elements import Element
from unmergeable.gauge.groups import contains, identity, sample
from unmergeable.randomness import Stream

BLOCKS, SIZE, COLUMNS = 2, 6, 40
PAIRED = {"rotary", "quarter_turn", "pair_sign", "pair_scale"}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def space_of(kind: GroupKind, pairing: Pairing = "half") -> Space:
    return Space("space", "query_key", Group(kind, pairing if kind in PAIRED else None), BLOCKS, SIZE)


def legs_of(space: Space, element: Element, share: float, variances: tuple[Variance, ...]) -> list[LegPair]:
    """Coordinates of a base, and the same under ``element`` after a change of ``share``."""
    legs = []
    for place, variance in enumerate(variances):
        # Outer, spectator and inner axes, and the two elements of a gain, in every combination.
        shape = [(1, BLOCKS, SIZE, COLUMNS), (5, BLOCKS, 3, SIZE, 1), (1, BLOCKS, 2, 2, SIZE, 4)][place % 3]
        base = normal(*shape, seed=10 + place)
        moved = element.apply(base + share * normal(*shape, seed=20 + place), variance)
        legs.append(LegPair(variance, moved, base))
    return legs


def distance(legs: list[LegPair], element: Element) -> float:
    return sum(float((element.apply(leg.protected, leg.variance) - leg.base).square().sum()) for leg in legs)


@pytest.mark.parametrize(
    ("kind", "pairing"),
    [(kind, "half") for kind in sorted(NEAREST)] + [(kind, "interleaved") for kind in sorted(PAIRED)],
)
def test_nothing_sampled_is_nearer(kind: GroupKind, pairing: Pairing) -> None:
    space = space_of(kind, pairing)
    variances: tuple[Variance, ...] = ("vector", "vector", "gain") if kind == "quarter_turn" else ("vector", "covector")
    for seed in range(3):
        planted = sample(space, Stream.from_seed(seed), 9.0)
        legs = legs_of(space, planted, 0.3, variances)
        found = NEAREST[kind](space, legs)

        assert contains(space, found)
        assert distance(legs, found) <= distance(legs, planted.inverse()) + 1e-9
        others = [sample(space, Stream.from_seed(100 + trial), 9.0) for trial in range(50)]
        assert distance(legs, found) <= min(distance(legs, other) for other in others) + 1e-9
        # The control: most elements are not near.
        assert sum(distance(legs, other) > 1.5 * distance(legs, found) for other in others) > 25


@pytest.mark.parametrize("kind", sorted(NEAREST_ISOMETRY))
def test_isometries_undo_isometries(kind: GroupKind) -> None:
    space = space_of(kind)
    variances: tuple[Variance, ...] = ("vector", "vector", "gain") if kind == "quarter_turn" else ("vector", "covector")
    for seed in range(3):
        planted = sample(space, Stream.from_seed(seed), 1.0)
        legs = legs_of(space, planted, 0.0, variances)
        found = NEAREST_ISOMETRY[kind](space, legs)

        assert contains(space, found)
        assert found.condition() == pytest.approx(1)
        assert torch.allclose(found.matrix(), planted.inverse().matrix(), atol=1e-10)


@pytest.mark.parametrize("kind", sorted(set(NEAREST) | set(NEAREST_ISOMETRY)))
def test_no_data_no_change(kind: GroupKind) -> None:
    space = space_of(kind)
    zero = torch.zeros(1, BLOCKS, SIZE, COLUMNS, dtype=torch.float64)
    legs = [LegPair("vector", zero, zero), LegPair("covector", zero, zero)]

    for table in (NEAREST, NEAREST_ISOMETRY):
        if kind in table:
            assert torch.equal(table[kind](space, legs).matrix(), identity(space).matrix())


def test_opposite_signs_of_heads_do_not_hide_a_quarter_turn() -> None:
    space = space_of("quarter_turn")
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 2, 1, 1)
    base = normal(1, BLOCKS, 1, SIZE, COLUMNS, seed=1).expand(-1, -1, 2, -1, -1)  # two heads whose products cancel
    for seed in range(3):
        planted = sample(space, Stream.from_seed(seed), 1.0)
        found = NEAREST["quarter_turn"](space, [LegPair("vector", signs * planted.apply(base, "vector"), base)])

        assert torch.equal(found.matrix().abs(), planted.inverse().matrix().abs())


def test_an_unrelated_pair_stays() -> None:
    space = space_of("rotary")
    protected, base = torch.zeros(2, 1, BLOCKS, SIZE, 2, dtype=torch.float64)
    protected[..., 0], base[..., 1] = 5.0, 1.0  # nothing in common
    legs = [LegPair("vector", protected, base), LegPair("covector", 2 * protected, base)]

    assert torch.equal(NEAREST["rotary"](space, legs).matrix(), identity(space).matrix())


def test_a_rotary_pair_whose_sides_disagree() -> None:
    """Both sides ask for other phases: the best compromise, found by searching the whole plane."""
    space = Space("space", "query_key", Group("rotary", "half"), 1, 2)
    for seed in range(10):
        legs = [
            LegPair(variance, normal(1, 1, 2, 4, seed=seed + place), normal(1, 1, 2, 4, seed=50 + seed + place))
            for place, variance in enumerate(("vector", "covector"))
        ]
        found = NEAREST["rotary"](space, legs)

        radius = torch.logspace(-1.5, 1.5, 400, dtype=torch.float64)[:, None]
        angle = torch.linspace(0, 2 * math.pi, 400, dtype=torch.float64)[None, :]
        z = torch.polar(radius.expand(-1, 400), angle.expand(400, -1)).flatten()
        lowest = torch.zeros(len(z), dtype=torch.float64)
        for leg in legs:
            x, y = (torch.complex(side[0, 0, 0], side[0, 0, 1]) for side in (leg.protected, leg.base))
            factor = z if leg.variance == "vector" else 1 / z.conj()
            lowest += (factor[:, None] * x - y).abs().square().sum(1)
        assert distance(legs, found) <= float(lowest.min()) + 1e-9


positive = st.floats(1e-3, 1e3)
signed = st.floats(-1e3, 1e3)


@settings(max_examples=200, deadline=None)
@given(positive, signed, positive, signed)
def test_nearest_scale_is_the_lowest_of_a_fine_grid(g: float, c: float, h: float, d: float) -> None:
    values = [torch.tensor([value], dtype=torch.float64) for value in (g, c, h, d)]
    found = nearest_scale(*values)

    def objective(a: Tensor) -> Tensor:
        return a.square() * g - 2 * a * c + h / a.square() - 2 * d / a

    # Every stationary point of g a^4 - c a^3 + d a - h lies within the Cauchy bound on its roots, and on 1 / roots.
    widest = 1 + max(abs(c), abs(d), h) / g
    narrowest = 1 / (1 + max(abs(c), abs(d), g) / h)
    grid = torch.logspace(math.log10(narrowest), math.log10(widest), 20001, dtype=torch.float64)
    lowest = objective(grid).min()
    assert float(found) > 0
    assert float(objective(found)) <= float(lowest) + 1e-9 * (g + abs(c) + h + abs(d) + abs(float(lowest)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ((4.0, 2.0, 0.0, 0.0), 0.5),
        ((0.0, 0.0, 6.0, 2.0), 3.0),
        ((0.0, 0.0, 0.0, 0.0), 1.0),
        ((4.0, -2.0, 0.0, 0.0), 1.0),
    ],
)
def test_a_scale_seen_from_one_side(data: tuple[float, ...], expected: float) -> None:
    found = nearest_scale(*(torch.tensor([value], dtype=torch.float64) for value in data))
    assert float(found) == pytest.approx(expected)
