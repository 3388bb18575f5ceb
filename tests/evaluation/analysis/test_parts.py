"""Gram matrices say where a task vector went: planted lengths, angles and changes of basis are found."""

from __future__ import annotations

import math

import pytest
import torch

from attacks.planted import Build, Network
from unmergeable.attacks.distance import block_distances
from unmergeable.attacks.nearest_orbit import NearestOrbit
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import Mismatch
from unmergeable.evaluation.analysis import canonical_source, part_grams, taken_together

# float32 weights hold a task vector of a twentieth of their size to 2^-24 / 0.05.
ROUNDING = 20 * 2.0**-24


def moved(toy: Network, expert: MemorySource, factor: float) -> MemorySource:
    """base + factor * task vector."""
    return MemorySource(
        {
            name: (base.double() + factor * (expert.tensors[name].double() - base.double())).to(base.dtype)
            for name, base in toy.base.tensors.items()
        },
        expert.config,
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "deepseek_v3"])
def test_distances_are_those_of_the_recoveries(name: str, network: Build) -> None:
    toy = network(name)
    expert = toy.expert(0.05)
    grams = part_grams([expert], toy.base, toy.architecture)
    expected = block_distances(expert, toy.base, toy.architecture)
    assert [(one.block, one.part) for one in grams] == [(one.block, one.part) for one in expected]
    for one, distance in zip(grams, expected, strict=True):
        assert one.distance(0) == pytest.approx(distance.relative, rel=1e-12)


@pytest.mark.parametrize("factor", [0.4, -1.0, 2.0])
def test_a_scaled_task_vector_keeps_its_direction(factor: float, network: Build) -> None:
    toy = network("llama")
    expert = toy.expert(0.05)
    for one in part_grams([moved(toy, expert, factor), expert], toy.base, toy.architecture):
        assert one.norm_ratio(0, 1) == pytest.approx(abs(factor), rel=ROUNDING / abs(factor))
        assert one.cosine(0, 1) == pytest.approx(math.copysign(1, factor), abs=ROUNDING**2 + 1e-9)


def test_another_basis_hides_where_it_went_and_the_canonical_form_shows_it(network: Build) -> None:
    toy = network("llama")
    expert = toy.expert(0.05)
    locked = toy.locked(expert, condition=4.0)
    found = canonical_source(locked, toy.base, toy.architecture)
    raw = taken_together(part_grams([locked, expert], toy.base, toy.architecture), "all")
    canonical = taken_together(part_grams([found, expert], toy.base, toy.architecture), "all")
    by_part = {one.part: one for one in raw}
    for part in ("query_key", "value_output"):
        assert by_part[part].norm_ratio(0, 1) > 10
        assert abs(by_part[part].cosine(0, 1)) < 0.3
    assert by_part["feed_forward"].cosine(0, 1) > 1 - 1e-6, "mergelock leaves it alone"
    fits = NearestOrbit().estimate(locked, toy.base, toy.architecture).fits
    for one in canonical:
        its = [fit for fit in fits if fit.after.part == one.part]
        numel, freedoms = sum(fit.after.numel for fit in its), sum(fit.freedoms for fit in its)
        # A fit of f numbers takes their share of a random task vector with it, and the rest is what it was.
        kept = math.sqrt(1 - freedoms / numel)
        assert one.norm_ratio(0, 1) == pytest.approx(kept, abs=3 / math.sqrt(numel))
        assert one.cosine(0, 1) == pytest.approx(kept, abs=3 / math.sqrt(numel))


def test_a_part_that_did_not_move(network: Build) -> None:
    toy = network("llama")
    for one in part_grams([toy.base, toy.expert(0.05)], toy.base, toy.architecture):
        assert (one.distance(0), one.norm_ratio(0, 1), one.cosine(0, 1)) == (0, 0, 0)
        assert one.norm_ratio(1, 0) == math.inf
        assert one.norm_ratio(0, 0) == 0


def test_taken_together_is_the_sum(network: Build) -> None:
    toy = network("llama")
    grams = part_grams([toy.expert(0.05)], toy.base, toy.architecture)
    together = taken_together(grams, "all")
    assert [one.part for one in together] == ["query_key", "value_output", "feed_forward"]
    for one in together:
        assert one.block == "all"
        torch.testing.assert_close(one.gram, sum(other.gram for other in grams if other.part == one.part))


def test_another_network_is_refused(network: Build) -> None:
    toy, other = network("llama"), network("bert")
    with pytest.raises(Mismatch, match="is missing from"):
        part_grams([other.base], toy.base, toy.architecture)
