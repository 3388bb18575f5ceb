from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.errors import UnmergeableError, UsageError
from unmergeable.network.train import Batch, Schedule, shuffled_batches, train


def small_network(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2))


def batches(seed: int = 0, count: int = 1000) -> Iterator[Batch]:
    """Points of the plane's two halves, told apart by the sign of the first coordinate."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        points = torch.randn(16, 4, generator=generator)
        yield points, (points[:, 0] > 0).long()


def cross_entropy(network: nn.Module, batch: Batch) -> Tensor:
    points, labels = batch
    return functional.cross_entropy(network(points), labels)


def weights(network: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def test_learns_a_task_it_can_learn() -> None:
    losses = train(small_network(), batches(), cross_entropy, Schedule(steps=200, learning_rate=1e-2))

    assert len(losses) == 200
    # A network that ignores its input cannot go below log 2 on balanced classes.
    assert sum(losses[-20:]) / 20 < 0.25 < 0.69


def test_a_rate_of_zero_learns_nothing() -> None:
    network = small_network()
    before = weights(network)

    train(network, batches(), cross_entropy, Schedule(steps=5, learning_rate=0.0))

    assert same(before, weights(network))


def test_the_same_seed_gives_the_same_network() -> None:
    runs = {}
    for run, seed in (("first", 1), ("again", 1), ("other", 2)):
        network = small_network(dropout=0.5)
        train(network, batches(), cross_entropy, Schedule(steps=10, learning_rate=1e-2), seed=seed)
        runs[run] = weights(network)

    assert same(runs["first"], runs["again"])
    assert not same(runs["first"], runs["other"])


def test_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()

    train(small_network(dropout=0.5), batches(), cross_entropy, Schedule(steps=3))

    assert torch.equal(state, torch.get_rng_state())


def test_only_the_chosen_parameters_change() -> None:
    network = small_network()
    before = dict(zip((name for name, _ in network.named_parameters()), weights(network), strict=True))

    train(
        network,
        batches(),
        cross_entropy,
        Schedule(steps=3, learning_rate=1e-2),
        is_trained=lambda name: name.startswith("3."),
    )

    changed = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"3.weight", "3.bias"}


def test_ends_in_evaluation_mode_without_gradients() -> None:
    network = small_network()
    next(network.parameters()).requires_grad_(requires_grad=False)

    train(network, batches(), cross_entropy, Schedule(steps=2), is_trained=lambda name: name == "0.weight")

    assert not network.training
    assert [parameter.requires_grad for parameter in network.parameters()] == [False, True, True, True]
    assert all(parameter.grad is None for parameter in network.parameters())


def test_takes_exactly_as_many_steps_as_it_was_told() -> None:
    stream = batches()
    reports: list[tuple[str, int, int, str]] = []

    losses = train(
        small_network(),
        stream,
        cross_entropy,
        Schedule(steps=4),
        stage="learning",
        progress=lambda *report: reports.append(report),
    )

    assert len(losses) == 4
    assert reports == [("learning", step, 4, "steps") for step in range(5)]
    assert len(list(stream)) == 996  # not one batch more was drawn


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_the_rate_climbs_then_falls_and_stays_positive(steps: int, warmup: float) -> None:
    schedule = Schedule(steps=steps, learning_rate=1.0, warmup=warmup)
    rates = [schedule.rate(step) for step in range(steps)]

    assert all(0 < rate <= 1 for rate in rates)
    after_warmup = rates[max(0, round(warmup * steps) - 1) :]
    assert after_warmup == sorted(after_warmup, reverse=True)


def test_too_few_batches() -> None:
    with pytest.raises(UsageError, match="batches for 3 of 5 steps"):
        train(small_network(), batches(count=3), cross_entropy, Schedule(steps=5))


def test_nothing_to_train() -> None:
    with pytest.raises(UsageError, match="no parameter"):
        train(small_network(), batches(), cross_entropy, Schedule(steps=1), is_trained=lambda name: False)


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    network = small_network()

    with pytest.raises(UnmergeableError, match="step 0; lower the learning rate"):
        train(network, batches(), lambda model, batch: model(batch[0]).sum() * torch.nan, Schedule(steps=2))
    assert all(torch.isfinite(value).all() for value in weights(network))


def test_an_epoch_sees_every_example_once() -> None:
    epoch = list(islice(shuffled_batches(12, 4, seed=0), 3))

    assert sorted(torch.cat(epoch).tolist()) == list(range(12))


def test_batches_are_full_and_epochs_differ() -> None:
    drawn = list(islice(shuffled_batches(10, 4, seed=0), 4))

    assert all(len(batch) == 4 for batch in drawn)
    assert not torch.equal(torch.cat(drawn[:2]), torch.cat(drawn[2:]))


def test_the_seed_decides_the_order() -> None:
    first, again, other = (next(shuffled_batches(100, 50, seed=seed)) for seed in (3, 3, 4))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_batch_larger_than_the_data() -> None:
    with pytest.raises(UsageError, match="do not fill a batch"):
        next(shuffled_batches(3, 4, seed=0))
