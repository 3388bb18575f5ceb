"""neuron_matching undoes a permutation of hidden units, and nothing else."""

from __future__ import annotations

import pytest
import torch

from attacks.planted import Build, Network
from unmergeable.attacks import NeuronMatching
from unmergeable.gauge.elements import Element, Monomial
from unmergeable.gauge.equivalence import compare
from unmergeable.gauge.gauge import Gauge, fixed_gauge
from unmergeable.gauge.groups import sample
from unmergeable.randomness import Stream

FAMILIES = ["gpt2", "bert", "llama", "phi3", "opt", "t5", "mixtral"]


def shuffled(toy: Network, scale: float = 1.0) -> Gauge:
    """Hidden units in another order, every second one scaled by ``scale`` where the architecture allows it."""
    elements: dict[str, Element] = {}
    for name, space in toy.architecture.symmetry.select("feed_forward").items():
        if space.group.kind == "permutation":
            elements[name] = sample(space, Stream.from_seed(1).child(name), 1.0)
        else:
            factors = torch.where(torch.arange(space.size) % 2 == 0, scale, 1.0).double()
            elements[name] = Monomial(torch.arange(space.size)[None], factors[None])
    return fixed_gauge(toy.architecture.symmetry.spaces, elements)


@pytest.mark.parametrize("name", [*FAMILIES, pytest.param("unet-sd15", marks=pytest.mark.slow)])
def test_undoes_a_permutation(name: str, network: Build) -> None:
    toy = network(name)
    key = shuffled(toy)
    for share in (0.001, 0.3):
        expert = toy.expert(share)
        unprotected = toy.distance(expert, "feed_forward")
        protected = toy.transformed(expert, key)
        estimate = NeuronMatching().estimate(protected, toy.base, toy.architecture)
        recovered = toy.transformed(protected, *estimate.gauges)

        assert estimate.before > 2 * unprotected
        assert estimate.after == pytest.approx(unprotected, rel=1e-6)
        # A permutation moves bits: undone, they are all in their places.
        assert all(torch.equal(recovered.tensors[tensor], expert.tensors[tensor]) for tensor in expert.tensors)
        assert compare(protected, recovered, toy.architecture, condition=1.0).is_equal


def test_leaves_attention_and_scales(network: Build) -> None:
    toy = network("llama")
    protected = toy.transformed(toy.expert(0.01), shuffled(toy, scale=8.0))
    estimate = NeuronMatching().estimate(protected, toy.base, toy.architecture)

    assert {fit.before.part for fit in estimate.fits} == {"feed_forward"}
    assert estimate.after > 0.5
    attention = [name for name in protected.tensors if "self_attn" in name]
    recovered = toy.transformed(protected, *estimate.gauges)
    assert all(torch.equal(recovered.tensors[name], protected.tensors[name]) for name in attention)
