"""A training run that was killed goes on from what it kept, to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.errors import CheckpointError
from unmergeable.network.train import Batch, Schedule, train
from unmergeable.network.training_state import Kept, read_tensors, write_tensors

STEPS, EVERY = 12, 5


class Killed(BaseException):
    """As sudden as a signal, as far as the loop can tell."""


def make_network() -> nn.Module:
    """With dropout, which draws from torch's generator, and a norm whose buffers change in training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


def batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    while True:
        points = torch.randn(16, 4, generator=generator)
        yield points, (points[:, 0] > 0).long()


def cross_entropy(network: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(network(batch[0]), batch[1])


def killed_at(step: int) -> Callable[[nn.Module, Batch], Tensor]:
    calls = 0

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > step:
            raise Killed
        return cross_entropy(network, batch)

    return loss


def run(kept: Kept | None, loss: Callable[[nn.Module, Batch], Tensor] = cross_entropy) -> tuple[nn.Module, list[float]]:
    network = make_network()
    return network, train(network, batches(), loss, Schedule(STEPS, learning_rate=1e-2), seed=3, kept=kept)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("step", [1, 5, 7, 11])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path, step: int) -> None:
    whole, losses = run(None)
    kept = Kept(tmp_path / "state.safetensors", "the run", EVERY)
    with pytest.raises(Killed):
        run(kept, killed_at(step))
    assert kept.file.exists() == (step >= EVERY)

    taken = 0

    def counting(network: nn.Module, batch: Batch) -> Tensor:
        nonlocal taken
        taken += 1
        return cross_entropy(network, batch)

    resumed, again = run(kept, counting)

    assert again == losses
    assert same(whole, resumed)
    assert taken == STEPS - step // EVERY * EVERY  # nothing is done twice
    assert all(parameter.grad is None for parameter in resumed.parameters())


def test_the_generator_is_part_of_the_state(tmp_path: Path) -> None:
    """Control: without it dropout would draw other numbers, and the end would be another."""
    whole, losses = run(None)
    kept = Kept(tmp_path / "state.safetensors", "the run", EVERY)
    with pytest.raises(Killed):
        run(kept, killed_at(7))
    state = read_tensors(kept.file, kept.token)
    assert state is not None
    state["generator"] = torch.Generator().manual_seed(99).get_state()
    write_tensors(kept.file, kept.token, state)

    resumed, again = run(kept)

    assert again[:EVERY] == losses[:EVERY]
    assert again[EVERY:] != losses[EVERY:]
    assert not same(whole, resumed)


def test_the_state_of_another_run_is_not_taken(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "state.safetensors", "the run", EVERY)
    with pytest.raises(Killed):
        run(kept, killed_at(7))
    whole, _ = run(None)
    started, losses = run(Kept(kept.file, "another run", EVERY))
    assert len(losses) == STEPS
    assert same(whole, started)


def test_keeping_changes_nothing(tmp_path: Path) -> None:
    whole, losses = run(None)
    kept, again = run(Kept(tmp_path / "state.safetensors", "the run", 1))
    assert again == losses
    assert same(whole, kept)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "state.safetensors", "the run", EVERY)
    with pytest.raises(Killed):
        run(kept, killed_at(7))
    kept.file.write_bytes(kept.file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"state\.safetensors cannot be read .*; remove it"):
        run(kept)


def test_tensors_go_round(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    tensors = {"b": torch.ones(2, 3, dtype=torch.bfloat16), "a": torch.arange(4), "": torch.tensor(2.5)}
    write_tensors(file, "it", tensors)
    found = read_tensors(file, "it")
    assert found is not None
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert read_tensors(file, "other") is None
    assert read_tensors(tmp_path / "none.safetensors", "it") is None
