"""What a change of basis costs when the weights are quantised: nothing for rotations, much for wide diagonals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from toy_checkpoints import toy_checkpoint
from unmergeable.architecture import Architecture
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.gauge.elements import Monomial
from unmergeable.gauge.gauge import fixed_gauge
from unmergeable.gauge.key import Key
from unmergeable.protections.exact import ExactProtection, ExactSequence
from unmergeable.protections.gauge import LargestGauge
from unmergeable.protections.mergelock import MergeLock
from unmergeable.protections.params import PaRaMS
from unmergeable.protections.quantised_loss import (
    GROUP,
    LEVELS,
    MATRICES,
    NOTICEABLE,
    NUMBERS,
    _looked_at,
    quantised_loss,
    rounded,
)


def test_rounding_is_to_fifteen_levels_of_the_largest() -> None:
    weight = torch.linspace(-1, 1, 2 * GROUP, dtype=torch.float64).repeat(2, 1)
    weight[1] = 0
    found = rounded(weight)
    for group, largest in ((found[0, :GROUP], 1.0), (found[0, GROUP:], 1.0)):
        steps = group * LEVELS / largest
        assert torch.allclose(steps, steps.round(), atol=1e-12)
    assert float((found - weight).abs().max()) <= 0.5 / LEVELS + 1e-12
    assert torch.equal(found[1], weight[1])


def loss_of(method: ExactProtection, name: str = "llama", tensors: Mapping[str, Tensor] | None = None) -> float:
    toy = toy_checkpoint(name)
    source = MemorySource(dict(tensors or toy.tensors), toy.config)
    sequence = ExactSequence((method,))
    key = Key(bytes(range(32)), {}, {f"0.{name}": order for name, order in orders(method, toy.architecture).items()})
    found = quantised_loss(source, toy.architecture, sequence.gauges(toy.architecture, key.draws, source))
    assert found is not None
    return found


def orders(method: ExactProtection, architecture: Architecture) -> dict[str, list[int]]:
    if not isinstance(method, PaRaMS):
        return {}
    return {name: list(range(space.size)) for name, space in method._reordered(architecture).items()}


def test_orthogonal_changes_lose_nothing_and_wide_diagonals_much() -> None:
    """Of Gaussian matrices every direction is like every other, so that a rotated one rounds as well; diagonals with
    entries from 0.05 to 20 spread the numbers of a group by as much, in the matrices of attention."""
    friendly = loss_of(LargestGauge(quantisation_friendly=True))
    assert 0.8 < friendly < 1.2
    assert loss_of(MergeLock(condition=1.0)) < 1.2
    assert loss_of(PaRaMS()) > NOTICEABLE
    assert 1 < loss_of(PaRaMS(smallest=0.9, largest=1.1)) < loss_of(PaRaMS(smallest=0.5, largest=2)) < loss_of(PaRaMS())


def test_a_gain_that_is_nearly_zero_spoils_a_rotated_stream() -> None:
    """Behind a small gain a column is divided by it, and fills the scale of its group."""
    tensors = {name: tensor.clone() for name, tensor in toy_checkpoint("llama").tensors.items()}
    before = loss_of(LargestGauge(quantisation_friendly=True), tensors=tensors)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor[:4] = 1e-3
    assert loss_of(LargestGauge(quantisation_friendly=True), tensors=tensors) > 3 * before


def test_a_permutation_of_rows_loses_exactly_nothing() -> None:
    toy = toy_checkpoint("llama")
    source = MemorySource(dict(toy.tensors), toy.config)
    spaces = toy.architecture.symmetry.select("feed_forward")
    order = {
        name: Monomial(torch.randperm(space.size, generator=torch.Generator().manual_seed(1))[None],
                       torch.ones(1, space.size, dtype=torch.float64))
        for name, space in spaces.items()
    }  # fmt: skip
    gauge = fixed_gauge(toy.architecture.symmetry.spaces, order)
    rows = [name for name in toy.architecture.symmetry.tensors_of(spaces) if "down" not in name]
    down = [name for name in toy.architecture.symmetry.tensors_of(spaces) if "down" in name]
    assert rows
    assert down
    whole = quantised_loss(source, toy.architecture, (gauge,))
    assert whole == pytest.approx(1, abs=0.1)  # the columns of `down` are in other groups now


@pytest.mark.parametrize("name", ["dinov2", "gpt2", "gemma2"])
def test_every_way_to_read_a_norm(name: str) -> None:
    """A head may read the stream twice (class token and mean), a gain may be stored less one, a weight transposed."""
    assert 0.7 < loss_of(LargestGauge(quantisation_friendly=True), name) < 1.4


def test_nothing_changed_is_nothing_predicted() -> None:
    toy = toy_checkpoint("llama")
    source = MemorySource(dict(toy.tensors), toy.config)
    assert quantised_loss(source, replace(toy.architecture), ()) is None


def test_large_matrices_are_looked_at_in_a_third_of_the_number() -> None:
    assert len(_looked_at(dict.fromkeys(map(str, range(100)), 1000))) == pytest.approx(MATRICES, abs=1)
    large = _looked_at(dict.fromkeys(map(str, range(100)), NUMBERS // 5))
    assert 4 <= len(large) <= 5
    assert len(_looked_at(dict.fromkeys(map(str, range(100)), NUMBERS))) == MATRICES // 3
    assert _looked_at({"alone": 10 * NUMBERS}) == ["alone"]
    assert _looked_at({}) == []
