"""The shield against a dense computation that sorts, its boundaries with equals, and its refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import BadInput, UsageError
from unmergeable.protections import SensitivityShield
from unmergeable.protections.sensitivity_shield import arithmetic
from unmergeable.protections.sensitivity_shield.arithmetic import (
    Boundaries,
    InputNorms,
    Shield,
    first_digits,
    unit_ends,
    unit_numbers,
)
from unmergeable.randomness import Stream
from unmergeable.settings import configure

SHAPES = {"first": (12, 9), "second": (7, 10), "gain": (5,), "scalar": ()}
RANKED = ("first", "second")
AXES = {"first": 1, "second": 0}


def weights(seed: int, spread: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: spread * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def moved(start: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    return {name: tensor + change for (name, tensor), change in zip(start.items(), weights(seed, 0.1).values())}  # noqa: B905


BASE = weights(0)
EXPERT, SIBLING, OTHER = (moved(BASE, seed) for seed in (1, 2, 3))


def norms(seed: int) -> dict[str, InputNorms]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: InputNorms(axis, torch.rand(SHAPES[name][axis], generator=generator, dtype=torch.float64))
        for name, axis in AXES.items()
    }


NORMS, PERTURBED_NORMS = norms(4), norms(5)


def make(settings: SensitivityShield, **changes: object) -> Shield:
    scores = {
        name: (NORMS[name], PERTURBED_NORMS[name])[: settings.scored_models]
        for name in RANKED
        if settings.scored_models
    }
    shield = Shield(
        settings,
        MemorySource(EXPERT),
        MemorySource(BASE),
        (MemorySource(SIBLING), MemorySource(OTHER)) if settings.reads_siblings else (),
        frozenset(SHAPES),
        RANKED if settings.is_local else (),
        Stream.from_seed(7),
        scores,
    )
    return replace(shield, **changes)  # type: ignore[arg-type]


def run(shield: Shield) -> dict[str, Tensor]:
    """All passes, one tensor at a time, as they are made over files."""
    sensitivities, counts = {}, first_digits(torch.zeros(0))
    for name in shield.ranked:
        rows = shield.rows(name)
        sensitivities[name] = shield.sensitivity(name, rows)
        for magnitudes in shield.magnitudes(name, rows, sensitivities[name]):
            counts += first_digits(magnitudes)
    boundaries = torch.zeros(0)
    if shield.ranked:
        search = Boundaries.after_first_pass(counts, shield.settings.unit)
        counts = search.zero_counts()
        for name in shield.ranked:
            for magnitudes in shield.magnitudes(name, shield.rows(name), sensitivities[name]):
                counts += search.count(magnitudes)
        boundaries = search.settled(counts)
    return {
        name: shield.release_(name, shield.expert.tensor(name), sensitivities.get(name), boundaries) for name in SHAPES
    }


def dense(settings: SensitivityShield, excluded: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The module's formulas with everything in memory and a sort."""
    mixture = {name: tensor.double() for name, tensor in EXPERT.items()}
    for share, sibling in zip(settings.mixed_shares, (SIBLING, OTHER), strict=False):
        mixture = {
            name: mixed + share * (sibling[name].double() - EXPERT[name].double()) for name, mixed in mixture.items()
        }
    if not settings.is_local:
        return {name: mixed.float() for name, mixed in mixture.items()}
    if excluded is None:
        models = [(mixture, NORMS)]
        other = {
            name: mixture[name] + settings.perturbation * (SIBLING[name].double() - BASE[name].double())
            for name in mixture
        }
        models += [(other, PERTURBED_NORMS)]
        excluded = {
            name: torch.stack(
                [top(model[name], its[name], settings.top_share) for model, its in models[: settings.scored_models]]
            ).all(0)
            for name in RANKED
        }
    ranked = torch.cat([(mixture[n] - BASE[n].double()).abs().float()[~excluded[n]] for n in RANKED])
    in_order = ranked.sort(descending=True).values
    units, size = math.ceil(1 / Fraction(str(settings.unit))), Fraction(str(settings.unit)) * len(in_order)
    found = {}
    for name, mixed in mixture.items():
        found[name] = mixed.float()
        if name not in RANKED:
            continue
        start, magnitudes = BASE[name].double(), (mixed - BASE[name].double()).abs().float()
        for at in (~excluded[name]).nonzero().tolist():
            place = tuple(at)
            unit = next((u for u in range(1, units) if magnitudes[place] >= in_order[math.floor(u * size) - 1]), units)
            sign = -1 if unit % 2 else 1
            found[name][place] = (mixed[place] + sign * (mixed[place] - start[place])).float()
    return found


def top(model: Tensor, its: InputNorms, share: float) -> Tensor:
    """Wanda's choice by a sort of every row."""
    rows = model if its.axis == 1 else model.T
    scores = rows.abs() * its.norms
    kept = int(share * scores.shape[1])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(1, scores.argsort(dim=1, descending=True)[:, :kept], True)
    return chosen if its.axis == 1 else chosen.T


@pytest.mark.parametrize("parts", ["global", "local", "both"])
@pytest.mark.parametrize("exclusion", ["wanda", "wanda_once"])
def test_is_the_dense_computation(parts: str, exclusion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = configure(
        SensitivityShield, {"parts": parts, "exclusion": exclusion, "top_share": 0.4, "unit": 0.07, "perturbation": 0.5}
    )
    whole = run(make(settings))
    expected = dense(settings)

    for name in SHAPES:
        # theta_G - tau_G is the base's weight: the dense sum has two roundings of float64 before the one of float32.
        torch.testing.assert_close(whole[name], expected[name], rtol=2.0**-23, atol=0, msg=name)
    if settings.is_local:
        assert not torch.equal(whole["first"], dense(replace(settings, parts="global"))["first"])
    monkeypatch.setattr(arithmetic, "PIECE_ELEMENTS", 13)
    pieces = run(make(settings))
    assert all(torch.equal(whole[name], pieces[name]) for name in SHAPES), "the result does not depend on the pieces"


def test_odd_units_are_the_base_even_units_twice_as_far_and_the_sensitive_stay() -> None:
    settings = SensitivityShield(parts="local", unit=0.25, exclusion="wanda_once")
    released = run(make(settings))
    sensitive = {name: top(EXPERT[name].double(), NORMS[name], 0.2) for name in RANKED}

    ranked = sum(int((~sensitive[name]).sum()) for name in RANKED)
    is_base = {name: released[name] == BASE[name] for name in RANKED}
    is_expert = {name: released[name] == EXPERT[name] for name in RANKED}
    assert all(torch.equal(is_expert[name], sensitive[name]) for name in RANKED)
    # Four units of a quarter each, the first and third of them back at the base.
    ends = [0, *unit_ends(ranked, 0.25), ranked]
    assert sum(int(mask.sum()) for mask in is_base.values()) == ends[1] - ends[0] + ends[3] - ends[2]
    assert torch.equal(released["gain"], EXPERT["gain"])


def test_all_weights_and_random_ones() -> None:
    """The rows ``none`` and ``random`` of the paper's ablation."""
    everything = {name: torch.zeros(SHAPES[name], dtype=torch.bool) for name in RANKED}
    none = SensitivityShield(exclusion="none", unit=0.1)
    released = run(make(none))
    expected = dense(none, everything)
    assert all(torch.allclose(released[name], expected[name], rtol=2.0**-23, atol=0) for name in SHAPES)

    drawn = SensitivityShield(exclusion="random", random_share=0.3, unit=0.1)
    first, again, other = run(make(drawn)), run(make(drawn)), run(make(drawn, stream=Stream.from_seed(8)))
    mixture = dense(SensitivityShield(parts="global"))
    kept = {name: first[name] == mixture[name] for name in RANKED}
    assert all(torch.equal(first[name], again[name]) for name in SHAPES)
    assert not torch.equal(first["first"], other["first"])
    count, total = sum(int(mask.sum()) for mask in kept.values()), sum(mask.numel() for mask in kept.values())
    assert abs(count - 0.3 * total) < 4 * math.sqrt(0.3 * 0.7 * total)
    expected = dense(drawn, kept)
    assert all(torch.allclose(first[name], expected[name], rtol=2.0**-23, atol=0) for name in SHAPES)


def test_everything_that_is_mixed_may_be_ranked() -> None:
    settings = SensitivityShield(parts="local", exclusion="none", unit=0.5, tensors="all")
    released = run(make(settings, ranked=tuple(SHAPES)))

    weights = torch.cat([(released[name] == BASE[name]).reshape(-1) for name in SHAPES])
    assert int(weights.sum()) == len(weights) // 2, "the larger half goes back to the base"
    assert not torch.equal(released["gain"], EXPERT["gain"])


@pytest.mark.parametrize("unit", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("kind", ["distinct", "few values", "one value", "a handful"])
def test_boundaries_are_exact_with_equals(kind: str, unit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(7 if kind == "a handful" else 10_000, generator=generator)
    if kind == "few values":
        values = (values * 20).floor() / 7
    if kind == "one value":
        values = torch.full_like(values, 0.25)
    in_order = values.sort(descending=True).values
    expected = [float(in_order[end - 1]) for end in unit_ends(len(values), unit)]

    pieces = values.split(999)
    counts = first_digits(torch.zeros(0))
    for piece in pieces:
        counts += first_digits(piece)
    search = Boundaries.after_first_pass(counts, unit)
    counts = search.zero_counts()
    for piece in reversed(pieces):  # in another order
        counts += search.count(piece)
    boundaries = search.settled(counts)

    assert boundaries.tolist() == sorted(expected)
    numbers = unit_numbers(values, boundaries)
    for number, value in enumerate(expected, start=1):
        assert bool((numbers[values >= value] <= number).all()), "all that reach the last of a unit are in it"
        assert bool((numbers[values < value] > number).all()), "and nothing else"


def test_shares_are_the_decimals_that_were_written() -> None:
    assert unit_ends(150, 0.02)[:3] == [3, 6, 9]
    assert len(unit_ends(1000, 0.02)) == 49
    assert unit_ends(3, 0.02) == [1, 2], "of fewer weights than units, each is a unit"
    assert unit_ends(10, 0.3) == [3, 6, 9], "the last unit is what is left"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefficients": "0.3,x"}, "coefficients must be numbers"),
        ({"coefficients": "0.7,0.4"}, "sum below 1"),
        ({"coefficients": "-0.1"}, "from 0 to 1"),
        ({"coefficients": "nan"}, "from 0 to 1"),
        ({"top_share": 1.0}, "top_share must lie between"),
        ({"unit": 0.0}, "unit must lie between"),
        ({"unit": "nan"}, "unit must lie between"),
        ({"perturbation": 0.0}, "perturbation must be above 0"),
        ({"random_share": 1.0}, "random_share must lie"),
        ({"examples": 0}, "at least one example"),
        ({"parts": "all"}, "parts must be one of global, local, both"),
        ({"exclusion": "sparsegpt"}, "exclusion must be one of"),
    ],
)
def test_refuses_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        configure(SensitivityShield, settings)


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        ({}, 0, "give one for each coefficient"),
        ({}, 1, r"coefficients=0.3,0.05 are 2 and siblings 1; give one for each"),
        ({"parts": "local"}, 0, "mixes in siblings"),
        ({"parts": "local", "exclusion": "none"}, 1, "leave the siblings out"),
    ],
)
def test_refuses_another_number_of_siblings(settings: dict[str, object], count: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        configure(SensitivityShield, settings).require_siblings(count)
    configure(SensitivityShield, settings).require_siblings({0: 2, 1: 2 if not settings else 0}[count])


def test_damaged_weights_are_refused() -> None:
    broken = {**SIBLING, "second": torch.full_like(SIBLING["second"], torch.nan)}
    settings = SensitivityShield(parts="global")
    with pytest.raises(BadInput, match="tensor second would hold NaN or infinity"):
        run(make(settings, siblings=(MemorySource(broken), MemorySource(OTHER))))


def test_a_matrix_without_a_score_is_not_ranked() -> None:
    """Whether it is sensitive is not known: it is mixed, and nothing else."""
    settings = SensitivityShield(unit=0.1)
    scores = {"first": (NORMS["first"], PERTURBED_NORMS["first"])}
    released, mixture = run(make(settings).scored_by(scores)), dense(SensitivityShield(parts="global"))

    assert torch.equal(released["second"], mixture["second"])
    assert not torch.equal(released["first"], mixture["first"])
    with pytest.raises(BadInput, match="no matrix of in-memory is a linear layer of the network"):
        make(settings).scored_by({})
    assert make(SensitivityShield(tensors="all")).scored_by(scores).ranked == RANKED
