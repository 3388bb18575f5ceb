"""A planted change of basis is gone from canonical weights, and only it."""

from __future__ import annotations

import pytest
import torch

from attacks.planted import Build
from rigged import everything
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.checkpoint.source import TensorSource
from unmergeable.evaluation.analysis import canonical_source

FAMILIES = ["llama", "bert", "mixtral"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_planted_key_is_gone(name: str, network: Build) -> None:
    """The canonical expert and the canonical protected expert are one point: both are the orbit's nearest."""
    toy = network(name)
    expert = toy.expert(0.05)
    protected = toy.transformed(expert, toy.key(condition=4.0))
    ours, theirs = (canonical_source(source, toy.base, toy.architecture) for source in (protected, expert))
    away = toy.distance(_held(ours))
    assert away == pytest.approx(toy.distance(_held(theirs)), rel=1e-3)
    assert away < 0.06
    assert toy.distance(protected) > 0.5  # control: it was far away


def test_planted_trades_are_gone(network: Build) -> None:
    """Constants and scales moved between tensors, which no change of basis brings back."""
    toy = network("mixtral")
    expert = toy.expert(0.05)
    traded = MemorySource(
        everything(dict(expert.tensors), toy.architecture, torch.Generator().manual_seed(1)), expert.config
    )
    canonical = _held(canonical_source(traded, toy.base, toy.architecture))
    assert toy.distance(canonical) <= 1.02 * toy.distance(expert)
    assert toy.distance(traded) > 0.5  # control: it was far away


def test_reads_like_the_checkpoint_it_is_made_from(network: Build) -> None:
    toy = network("llama")
    expert = toy.expert(0.05)
    canonical = canonical_source(toy.transformed(expert, toy.key(condition=4.0)), toy.base, toy.architecture)
    assert canonical.names == expert.names
    assert "in the basis of its base" in canonical.description
    for name in canonical.names:
        assert canonical.tensor(name).dtype == expert.tensors[name].dtype
        assert canonical.tensor(name).shape == expert.tensors[name].shape
    embedding = "model.embed_tokens.weight"
    assert torch.equal(canonical.tensor(embedding), expert.tensors[embedding]), "no key moved it"


def _held(source: TensorSource) -> MemorySource:
    return MemorySource({name: source.tensor(name) for name in source.names}, source.config)
