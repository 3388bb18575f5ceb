"""diagonal_ratio undoes scales of coordinates, and no rotation."""

from __future__ import annotations

import pytest
import torch

from attacks.planted import Build, Network
from unmergeable.attacks import DiagonalRatio, NearestOrbit, NeuronMatching
from unmergeable.attacks.closed_forms import over_pairs
from unmergeable.attacks.diagonal_ratio import RATIOS, ratio
from unmergeable.gauge.elements import Element, Monomial, Rotary
from unmergeable.gauge.equivalence import compare
from unmergeable.gauge.gauge import Gauge, fixed_gauge
from unmergeable.randomness import Stream

FAMILIES = ["bert", "gpt2", "llama", "gptj", "t5", "opt", "phi3", "deepseek_v3", "qwen3", "stablelm-qk-norm"]


def scaled(toy: Network) -> Gauge:
    """The scales of PaRaMS's public code, uniform in [0.05, 20], with signs where the group has them."""
    elements: dict[str, Element] = {}
    for name, space in DiagonalRatio().spaces(toy.architecture).items():
        stream = Stream.from_seed(1).child(name)
        count = space.size // 2 if space.group.pairing is not None else space.size
        factors = torch.from_numpy(0.05 + 19.95 * stream.uniform(space.blocks, count))
        if space.group.kind == "pair_scale":
            factors = over_pairs(space, factors)
        elif space.group.kind != "positive_diagonal":
            factors = factors * torch.from_numpy(stream.child("sign").signs(space.blocks, count))
        if space.group.kind == "rotary":
            assert space.group.pairing is not None
            elements[name] = Rotary(factors.to(torch.complex128), space.group.pairing)
        else:
            elements[name] = Monomial(torch.arange(space.size).expand(space.blocks, -1), factors)
    return fixed_gauge(toy.architecture.symmetry.spaces, elements)


@pytest.mark.parametrize("name", FAMILIES)
def test_undoes_scales(name: str, network: Build) -> None:
    toy = network(name)
    for share in (0.001, 0.1):
        expert = toy.expert(share)
        protected = toy.transformed(expert, scaled(toy))
        estimate = DiagonalRatio().estimate(protected, toy.base, toy.architecture)

        assert estimate.before > 2 * toy.distance(expert)
        # a and c are each off by the noise along one of hidden_size directions.
        assert estimate.after <= 1.05 * toy.distance(expert)
        recovered = toy.transformed(protected, *estimate.gauges)
        assert compare(protected, recovered, toy.architecture, condition=estimate.condition()).is_equal


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_leaves_rotations(name: str, network: Build) -> None:
    toy = network(name)
    protected = toy.locked(toy.expert(0.01), 1.0)

    assert DiagonalRatio().estimate(protected, toy.base, toy.architecture).after > 0.5
    assert NearestOrbit().estimate(protected, toy.base, toy.architecture).after < 0.02  # the control


def test_completes_the_attack_on_permuted_units(network: Build) -> None:
    toy = network("bert")
    expert = toy.expert(0.1)
    orders = NeuronMatching().spaces(toy.architecture)
    permutations = {
        name: Monomial(
            torch.from_numpy(Stream.from_seed(2).child(name).permutations(1, space.size)),
            torch.ones(1, space.size).double(),
        )
        for name, space in orders.items()
    }
    protected = toy.transformed(expert, scaled(toy), fixed_gauge(orders, permutations))
    matched = toy.transformed(protected, *NeuronMatching().estimate(protected, toy.base, toy.architecture).gauges)
    both = toy.transformed(matched, *DiagonalRatio().estimate(matched, toy.base, toy.architecture).gauges)

    assert toy.distance(both) <= 1.05 * toy.distance(expert)
    assert toy.distance(matched) > 2 * toy.distance(expert)


def test_ratios_that_contradict_each_other_change_nothing() -> None:
    ones = torch.ones(4, dtype=torch.float64)
    vector, covector = torch.tensor([4.0, -4.0, 4.0, 0.0]).double(), torch.tensor([0.25, -0.25, -0.25, 1.0]).double()

    assert ratio(vector, ones, covector, ones).tolist() == [0.25, -0.25, 1.0, 1.0]
    assert ratio(vector, 0 * ones, covector, ones).tolist() == [1.0] * 4


def test_looks_at_every_group_with_a_scale() -> None:
    assert set(RATIOS) == {"general_linear", "rotary", "pair_scale", "diagonal", "positive_diagonal"}
