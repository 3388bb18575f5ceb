"""Stage 1 of MergeGuard: what is trained, what is penalised, and that a low-rank update is penalised as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.load import load_network
from unmergeable.network.low_rank import low_rank_updates
from unmergeable.network.tasks import Task, accuracy
from unmergeable.network.train import Batch, Schedule, train
from unmergeable.network.training_state import Kept
from unmergeable.protections import MergeGuard
from unmergeable.protections.mergeguard.dispersal import disperse, weight_penalty
from zoo import TOYS, write_toy

MATRICES = {
    f"{place}.{part}": [f"{place}.{part}.weight"]
    for place in ("vit.encoder.layer.0", "vit.encoder.layer.1")
    for part in (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
}


def make(folder: Path) -> tuple[nn.Module, Task]:
    """A vision transformer, and images with labels of its own but for a few."""
    network = load_network(write_toy(TOYS["vit"], folder))
    pixels = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = network(pixel_values=pixels).logits.argmax(dim=-1)
    labels[:4] = 1 - labels[:4].clamp(max=1)
    return network, Task("images", [EncodedBatch({"pixel_values": pixels}, labels)])


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.named_parameters()}


def total(network: nn.Module, changed: set[str]) -> float:
    return sum(float(tensor.double().square().sum()) for name, tensor in weights_of(network).items() if name in changed)


@pytest.mark.parametrize("low_rank", [0, 2])
def test_only_the_named_weights_learn(tmp_path: Path, low_rank: int) -> None:
    network, task = make(tmp_path)
    before = weights_of(network)
    method = MergeGuard(steps=3, learning_rate=1e-3, batch_size=8, low_rank=low_rank)
    losses = disperse(network, task, MATRICES, method)
    changed = {name for name, tensor in weights_of(network).items() if not torch.equal(tensor, before[name])}
    assert len(losses) == 3
    assert len(changed) == len(MATRICES)
    assert all(name.endswith("weight") and ".layer" in name and "norm" not in name for name in changed)
    if low_rank:
        for name in changed:
            singular = torch.linalg.svdvals(weights_of(network)[name].double() - before[name].double())
            # Sums in float32 of numbers below 1 leave the other singular values at rounding.
            assert singular[low_rank] < 1e-3 * singular[0]


def test_the_penalty_makes_weights_smaller(tmp_path: Path) -> None:
    found = {}
    for alpha in (0.0, 0.01):
        network, task = make(tmp_path)
        before = weights_of(network)
        disperse(network, task, MATRICES, MergeGuard(steps=20, learning_rate=1e-3, batch_size=8, alpha=alpha))
        changed = {name for name, tensor in weights_of(network).items() if not torch.equal(tensor, before[name])}
        start = sum(float(before[name].double().square().sum()) for name in changed)
        found[alpha] = total(network, changed) / start
    # AdamW moves each weight by about its rate and step, all in one direction where the penalty rules.
    assert found[0.01] < 0.97 < found[0.0]


def test_learns_the_task(tmp_path: Path) -> None:
    network, task = make(tmp_path)
    assert accuracy(network, task) < 0.9
    disperse(network, task, MATRICES, MergeGuard(steps=40, learning_rate=1e-3, batch_size=24, alpha=0.0))
    assert accuracy(network, task) == 1


@pytest.mark.parametrize("low_rank", [0, 2])
def test_goes_on_after_a_kill(tmp_path: Path, low_rank: int) -> None:
    method = MergeGuard(steps=6, learning_rate=1e-3, batch_size=8, low_rank=low_rank)
    whole, task = make(tmp_path / "toy")
    losses = disperse(whole, task, MATRICES, method)
    kept = Kept(tmp_path / "state.safetensors", "the run", 2)

    class Killed(BaseException):
        pass

    def kill(stage: str, done: int, count: int, unit: str) -> None:
        if done == 5:
            raise Killed

    interrupted, _ = make(tmp_path / "toy")
    with pytest.raises(Killed):
        disperse(interrupted, task, MATRICES, method, kept=kept, progress=kill)
    resumed, _ = make(tmp_path / "toy")
    assert disperse(resumed, task, MATRICES, method, kept=kept) == losses
    after = weights_of(whole)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights_of(resumed).items())


def test_sum_and_mean_of_squares() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    weights = [[network[0].weight, network[0].bias], [network[1].weight]]
    squares = [sum(float(w.detach().double().square().sum()) for w in its) for its in weights]
    # Sums of at most 16 squares in float32.
    assert weight_penalty(network, weights, 0.5, "sum")().item() == pytest.approx(0.5 * sum(squares), rel=1e-5)
    mean = 0.5 * (squares[0] / 16 + squares[1] / 8)
    assert weight_penalty(network, weights, 0.5, "mean")().item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("toy", ["llama", "gpt2"])
def test_a_low_rank_update_is_penalised_with_its_weight(tmp_path: Path, toy: str) -> None:
    """Against the square of W + s B A put together, which is what the merged network holds; linear and Conv1D."""
    network = load_network(write_toy(TOYS[toy], tmp_path))
    weights = [parameter for name, parameter in network.named_parameters() if ".mlp." in name and parameter.dim() == 2]
    start = sum(float(weight.detach().double().square().sum()) for weight in weights)
    batch = EncodedBatch(TOYS[toy].inputs(torch.Generator().manual_seed(0)))

    def loss(network: nn.Module, batch: Batch) -> torch.Tensor:
        return network(input_ids=batch[0]).logits.square().mean()

    with low_rank_updates(network, rank=3, alpha=6.0, seed=0) as is_trained:
        train(network, [(batch.inputs["input_ids"],)] * 3, loss, Schedule(3, 0.05), is_trained=is_trained)
        penalty = weight_penalty(network, [weights], 1.0, "sum")().item()
    merged = sum(float(weight.detach().double().square().sum()) for weight in weights)
    # Thousands of float32 products; the update itself is far larger than their rounding.
    assert penalty == pytest.approx(merged, rel=1e-4)
    assert abs(merged - start) > 0.01 * start
