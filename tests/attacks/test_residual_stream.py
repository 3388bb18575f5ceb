"""The residual stream is found where somebody moved it, and left alone where nobody did or nothing can tell."""

from __future__ import annotations

import math

import pytest
import torch

from attacks.planted import Build, Network
from unmergeable.attacks import NearestOrbit
from unmergeable.attacks.reading import Reader
from unmergeable.attacks.residual_stream import Stream, find_stream, refined
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.gauge.elements import Monomial
from unmergeable.gauge.gauge import Gauge, fixed_gauge, sampled_gauge
from unmergeable.gauge.groups import contains
from unmergeable.randomness import Stream as RandomStream


def find(toy: Network, protected: MemorySource) -> Stream:
    symmetry = toy.architecture.symmetry
    spaces = NearestOrbit().spaces(toy.architecture)
    return find_stream(Reader(protected, symmetry), Reader(toy.base, symmetry), toy.architecture, spaces)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "orthogonal"), ("gemma2", "signed_permutation"), ("gpt_neox", "centred_orthogonal")]
)
def test_turns_the_stream_back(name: str, kind: str, network: Build) -> None:
    toy = network(name)
    key = toy.stream_key(toy.base, 4.0)
    stream = find(toy, toy.transformed(toy.base, *key))

    ((space, element),) = [(stream.turn.spaces[name], stream.turn[name]) for name in stream.turn]
    assert space.group.kind == kind
    assert contains(space, element, 1e-6)
    returned = element.matrix() @ key[-1][space.name].matrix()
    # Products of float32 embeddings, 67 tokens by 48 coordinates, whose condition number is below 100.
    assert (returned - torch.eye(space.size)).abs().max() <= 100 * 48**0.5 * 2.0**-24


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "bert"])
def test_tokens_that_a_fine_tune_took_far_away_do_not_take_the_stream_along(
    name: str, network: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of 67 tokens, thirty times as long as any; the control follows them."""
    toy = network(name)
    usual = toy.expert(0.02)
    embedding = toy.architecture.residuals[0].axes[0].tensor
    moved = usual.tensors[embedding].clone()
    away = torch.randn(2, moved.shape[1], generator=torch.Generator().manual_seed(1))
    moved[[3, 11]] = away / away.norm(dim=1, keepdim=True) * 30 * moved.norm(dim=1).max()
    odd = MemorySource({**usual.tensors, embedding: moved}, usual.config)

    def error(expert: MemorySource) -> float:
        key = toy.stream_key(expert, 4.0)
        turn = find(toy, toy.transformed(expert, *key)).turn
        if list(turn) != list(key[-1]):
            return math.inf
        (space,) = turn
        return float((turn[space].matrix() @ key[-1][space].matrix() - torch.eye(moved.shape[1])).norm())

    # Two vectors of 67 fewer: a little less is known.
    assert error(odd) <= 1.2 * error(usual)
    monkeypatch.setattr("unmergeable.attacks.residual_stream.MAX_WEIGHTINGS", 1)
    assert error(odd) > 0.5


def test_a_permutation_with_one_sign(network: Build) -> None:
    toy = network("bert")
    symmetry = toy.architecture.symmetry
    signs = set()
    for seed in range(4):
        key = sampled_gauge(symmetry.select("residual"), RandomStream.from_seed(seed), 1.0)
        stream = find(toy, toy.transformed(toy.expert(0.3), key))

        assert not stream.is_refinable
        assert torch.equal(stream.turn["residual"].matrix(), key["residual"].inverse().matrix())
        signs.add(float(key["residual"].matrix().sum().sign()))
    assert signs == {1, -1}


@pytest.mark.parametrize("name", ["gpt_neox", "vit"])
def test_a_permutation_where_rotations_would_do_too(name: str, network: Build) -> None:
    """Found exactly, though a rotation that follows the task vector is nearer."""
    toy = network(name)
    key = sampled_gauge(toy.architecture.symmetry.select("residual"), RandomStream.from_seed(1), 1.0)
    stream = find(toy, toy.transformed(toy.expert(0.3), key))

    assert torch.equal(stream.turn["residual"].matrix(), key["residual"].inverse().matrix())


def test_notices_a_few_signs(network: Build) -> None:
    toy = network("gemma2")
    space = toy.architecture.symmetry.spaces["residual"]
    signs = torch.ones(1, space.size, dtype=torch.float64)
    signs[0, :2] = -1
    key = fixed_gauge({space.name: space}, {space.name: Monomial(torch.arange(space.size)[None], signs)})
    stream = find(toy, toy.transformed(toy.expert(0.3), key))

    assert torch.equal(stream.turn[space.name].matrix(), key[space.name].matrix())


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "gemma2", "gpt_neox", "vit"])
def test_stays_where_nobody_moved_it(name: str, network: Build) -> None:
    toy = network(name)

    for source in (toy.base, toy.expert(0.1), toy.expert(0.3), toy.transformed(toy.expert(0.1), toy.key(4.0))):
        assert find(toy, source).gauges == ()


def test_stays_where_nothing_can_tell(network: Build) -> None:
    """A base with another vocabulary, and no output head of its own."""
    toy = network("llama")
    wider = {name: tensor for name, tensor in toy.base.tensors.items() if name != "lm_head.weight"}
    wider["model.embed_tokens.weight"] = torch.cat([toy.base.tensors["model.embed_tokens.weight"], torch.zeros(3, 48)])
    resized = Network(toy.name, toy.folder, MemorySource(wider, toy.base.config), toy.architecture)
    protected = toy.transformed(toy.expert(0.01), toy.key(4.0))

    assert find(resized, protected).turn.spaces == {}
    assert NearestOrbit().estimate(protected, resized.base, toy.architecture).after <= 0.01


def test_refining_brings_a_rotation_nearer(network: Build) -> None:
    toy = network("llama")
    symmetry = toy.architecture.symmetry
    expert = toy.expert(0.1)
    key = toy.stream_key(expert, 4.0)
    protected = toy.transformed(expert, *key)
    first = find(toy, protected)
    better = refined(first, (), Reader(protected, symmetry), Reader(toy.base, symmetry), toy.architecture)

    def error(stream: Stream) -> float:
        (space,) = stream.turn
        returned = stream.turn[space].matrix() @ key[-1][space].matrix()
        return float((returned - torch.eye(48)).norm())

    assert error(better) < 0.5 * error(first)
    assert isinstance(better.gains, Gauge)
    assert set(better.gains) == set(first.gains)
