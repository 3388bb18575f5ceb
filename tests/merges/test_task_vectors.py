"""Merges in memory have the bits of merges through files, and reach a network without being copied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from merges.small_models import make_models
from unmergeable.errors import Mismatch, UsageError
from unmergeable.merges import AdaMerging, TaskArithmetic, merge_state_dicts
from unmergeable.merges.task_vectors import TaskVectors, score_merges
from unmergeable.merges.variation import Variation

State = dict[str, Tensor]


def equal(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_has_the_bits_of_task_arithmetic(count: int, dtype: torch.dtype) -> None:
    base, experts = make_models(count, dtype)
    task_vectors = TaskVectors.between(base, experts)
    coefficients = [0.4, -0.3, 1.5][:count]
    merged = task_vectors.merged(coefficients)
    assert equal(merged, merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=coefficients))
    assert not equal(merged, task_vectors.merged([0.4] * count) if count > 1 else base)  # control


def test_sixteen_bit_models_differ_by_the_last_rounding_only() -> None:
    base, experts = make_models(2, torch.bfloat16)
    merged = TaskVectors.between(base, experts).merged((0.4, 0.9))
    expected = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.4, 0.9])
    assert merged["layers.0.weight"].dtype == torch.float32
    assert all(torch.equal(merged[name].to(expected[name].dtype), expected[name]) for name in expected)


def test_coefficients_may_differ_from_tensor_to_tensor() -> None:
    base, experts = make_models(2)
    own = {"layers.0.weight": (0.1, 0.2)}
    merged = TaskVectors.between(base, experts).merged(lambda name: own.get(name, (0.5, 0.6)))
    vary = {name: Variation(values) for name, values in own.items()}
    expected = merge_state_dicts(
        base, experts, method=TaskArithmetic(), coefficients=[0.5, 0.6], vary=lambda name: vary.get(name, Variation())
    )
    assert equal(merged, expected)


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_elected_task_vectors_have_the_bits_of_the_streamed_ones(density: float) -> None:
    base, experts = make_models(3)
    task_vectors = TaskVectors.between(base, experts)
    kept = {name: vector.clone() for name, vector in task_vectors.vectors[0].items()}
    merged = task_vectors.elected(density).merged((0.3, 0.4, 0.5))
    method = AdaMerging(task_vectors="ties", density=density)
    assert equal(merged, merge_state_dicts(base, experts, method=method, coefficients=[0.3, 0.4, 0.5]))
    assert not equal(merged, task_vectors.merged((0.3, 0.4, 0.5)))  # control
    assert equal(dict(task_vectors.vectors[0]), kept)  # they are new ones


def test_a_merge_may_be_written_into_another() -> None:
    base, experts = make_models(2)
    task_vectors = TaskVectors.between(base, experts)
    buffer = task_vectors.merged((0.0, 0.0))
    memory = {name: tensor.data_ptr() for name, tensor in buffer.items()}
    again = task_vectors.merged((0.4, 0.9), into=buffer)
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == memory
    assert equal(buffer, task_vectors.merged((0.4, 0.9)))
    assert equal({n: task_vectors.base[n] for n in base}, base)


class Sum(nn.Module):
    """A network that answers with the sum of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self) -> float:
        return float(self.weight.detach().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_sweep_scores_every_merge_in_one_buffer(dtype: torch.dtype) -> None:
    """A network of another dtype needs a copy, and must not go on with the first merge."""
    network = Sum().to(dtype)
    own = network.weight.data_ptr()
    task_vectors = TaskVectors.between(
        {"weight": torch.zeros(2)}, [{"weight": torch.tensor([1.0, 0.0])}, {"weight": torch.tensor([0.0, 8.0])}]
    )
    seen = set()

    def score(network: Sum) -> float:
        seen.add(network.weight.data_ptr())
        return network()

    grid = [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    assert score_merges(network, task_vectors, grid, score) == [0.0, 1.0, 4.5, 8.0]
    assert own not in seen
    if dtype == torch.float32:
        assert len(seen) == 1
    assert (network(), network.weight.data_ptr()) == (3.0, own)
    assert score_merges(network, task_vectors, [], score) == []


def test_the_network_has_its_weights_again_after_an_error() -> None:
    network = Sum()
    task_vectors = TaskVectors.between({"weight": torch.zeros(2)}, [{"weight": torch.ones(2)}])

    def fail(network: Sum) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        score_merges(network, task_vectors, [(1.0,)], fail)
    assert network() == 3.0


def test_refuses() -> None:
    base, experts = make_models(2)
    task_vectors = TaskVectors.between(base, experts)
    with pytest.raises(UsageError, match=r"embed.weight: 1 coefficients for 2 experts"):
        task_vectors.merged((1.0,))
    del experts[1]["scale"]
    with pytest.raises(Mismatch, match="scale: in base but not in expert 2"):
        TaskVectors.between(base, experts)
    with pytest.raises(Mismatch, match="the network has no such tensor"):
        score_merges(Sum(), task_vectors, [(1.0, 1.0)], lambda network: 0.0)
