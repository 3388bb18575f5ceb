"""The most critical layers are those that zeroing each in turn finds, for less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from network.small_classifier import predict
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.network.disk_weights import swapped
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Prediction, Task, accuracy
from unmergeable.protections.mergeguard.criticality import Criticality, find_critical_layers
from unmergeable.protections.trained import block_of
from zoo import TOYS, write_toy

WIDTH, CLASSES, BLOCKS = 8, 5, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        return features + self.down(torch.tanh(self.up(features)))


class Residual(nn.Module):
    """Blocks that add to a stream, each by another amount."""

    def __init__(self, seed: int = 0, loudest: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, CLASSES)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / WIDTH**0.5)
            for number, block in enumerate(self.blocks):
                loudness = 0.05 + 0.6 * float(torch.rand((), generator=generator))
                block.down.weight *= 5 if number == loudest else loudness

    def forward(self, features: Tensor) -> Tensor:
        for block in self.blocks:
            features = block(features)
        return self.head(features)


LAYERS = {
    f"blocks.{number}.{part}": (f"blocks.{number}.{part}.weight", f"blocks.{number}.{part}.bias")
    for number in range(BLOCKS)
    for part in ("up", "down")
}


def make_task(network: nn.Module, count: int = 600, batch_size: int = 20, wrong: float = 0.1) -> Task:
    """Labelled by the network itself, part of the labels at random."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(count, WIDTH, generator=generator)
    with torch.no_grad():
        labels = network(features).argmax(dim=-1)
    other = torch.randint(CLASSES, (count,), generator=generator)
    labels = torch.where(torch.rand(count, generator=generator) < wrong, other, labels)
    starts = range(0, count, batch_size)
    batches = [EncodedBatch({"features": features[s : s + batch_size]}, labels[s : s + batch_size]) for s in starts]
    return Task("stream", batches, predict)


def naive_drops(network: Any, task: Task, layers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Zero each layer in turn and score everything."""
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    intact, drops = accuracy(network, task), {}
    for layer, names in layers.items():
        with swapped(network, {name: torch.zeros_like(weights[name]) for name in names}):
            drops[layer] = intact - accuracy(network, task)
    return drops


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 1), (2, 3), (3, 3), (4, 12)])
def test_finds_what_zeroing_each_in_turn_finds(seed: int, count: int) -> None:
    network = Residual(seed)
    task = make_task(network)
    drops = naive_drops(network, task, LAYERS)
    found = find_critical_layers(network, task, LAYERS, count)
    # In the order of their drops: no layer that was left out may be more critical than one that was not.
    cut = sorted(drops.values(), reverse=True)[count - 1]
    assert all(drops[layer] >= cut - 1e-12 for layer in found.critical)
    assert len(set(found.critical)) == count
    # Control: other seeds have other critical layers, so that guessing would fail.
    others = naive_drops(Residual(seed + 1), make_task(Residual(seed + 1)), LAYERS)
    assert max(others, key=lambda layer: others[layer]) != max(drops, key=lambda layer: drops[layer])


@pytest.mark.parametrize("loudest", [0, 6, 11])
def test_a_planted_layer_is_found_early(loudest: int) -> None:
    network = Residual(3, loudest)
    task = make_task(network)
    found = find_critical_layers(network, task, LAYERS, 2)
    assert {layer.rpartition(".")[0] for layer in found.critical} == {f"blocks.{loudest}"}
    # Control: without the plant another one is.
    quiet = Residual(3)
    assert f"blocks.{loudest}.down" not in find_critical_layers(quiet, make_task(quiet), LAYERS, 1).critical
    # A tenth of the evaluations, of which those that ran skipped the blocks before the layer.
    assert found.evaluations < 0.1 * len(LAYERS) * found.examples


def test_all_examples_give_the_exact_drops() -> None:
    network = Residual(2)
    task = make_task(network, count=100)
    found = find_critical_layers(network, task, LAYERS, 4, confidence=1)
    drops = naive_drops(network, task, LAYERS)
    assert found.accuracy == accuracy(network, task)
    assert found.scored == dict.fromkeys(LAYERS, 100)
    for layer, drop in drops.items():
        assert found.drops[layer] == pytest.approx(drop, abs=1e-12)  # both are differences of counts over 100
    assert set(found.critical) == set(sorted(drops, key=lambda layer: -drops[layer])[:4])


def test_a_layer_that_cannot_matter_is_out_and_one_run_serves_twins() -> None:
    network = Residual(4)
    with torch.no_grad():
        network.blocks[2].down.weight.zero_()
        network.blocks[2].down.bias.zero_()
    task = make_task(network)
    found = find_critical_layers(network, task, LAYERS, 3)
    assert found.drops["blocks.2.up"] == found.drops["blocks.2.down"] == 0
    assert found.scored["blocks.2.up"] < found.examples
    # Both are the intact network: after the first batch they are scored once.
    assert found.evaluations < sum(found.scored.values())


def test_blocks_before_the_layer_do_not_run() -> None:
    network = Residual()
    task = make_task(network, count=20)
    find_critical_layers(network, task, LAYERS, 4, confidence=1)
    calls = [block.calls for block in network.blocks]
    # Once to label, once to see what the answers are like, once intact; then for each layer of it or of earlier ones.
    assert calls == [3 + 2 * (number + 1) for number in range(BLOCKS)]


def test_the_network_is_left_as_it_was() -> None:
    network = Residual()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    find_critical_layers(network, make_task(network), LAYERS, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert addresses == {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    assert all("forward" not in vars(module) for module in network.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "dinov2", "t5", "mixtral", "deepseek_v3", "clip"])
def test_kept_outputs_change_no_bit_in_real_networks(name: str, tmp_path: Path) -> None:
    """The answers of the network with a layer at zero, with blocks replayed and without."""
    toy = TOYS[name]
    folder = write_toy(toy, tmp_path)
    network = load_network(folder)
    stored = load_file(folder / "model.safetensors")
    layers: dict[str, list[str]] = {}
    for tensor in stored:
        if block_of(tensor):
            layers.setdefault(tensor.rpartition(".")[0], []).append(tensor)
    batch = EncodedBatch(toy.inputs(torch.Generator().manual_seed(0)))
    answers: list[Tensor] = []

    def ask(network: Any, batch: EncodedBatch) -> Prediction:
        answers.append(getattr(network(**batch.inputs), toy.output).reshape(len(batch), -1).clone())
        return Prediction(answers[-1], torch.zeros(len(batch), dtype=torch.int64))

    find_critical_layers(network, Task("toy", [batch], ask), layers, 1, confidence=1)
    found, answers = answers[2:], []
    for names in layers.values():
        with swapped(network, {tensor: torch.zeros_like(stored[tensor]) for tensor in names}), torch.no_grad():
            ask(network, batch)
    assert len(found) == len(answers) == len(layers)
    assert all(map(torch.equal, found, answers))
    # Control: the layers do something, or nothing would be compared.
    assert len({answer.numpy().tobytes() for answer in answers}) > len(layers) // 4


def test_a_text_is_one_example_with_many_choices(tmp_path: Path) -> None:
    folder = write_toy(TOYS["llama"], tmp_path)
    network = load_network(folder)
    batch = EncodedBatch(TOYS["llama"].inputs(torch.Generator().manual_seed(0)))
    task = Task("texts", [batch, batch])
    layers = {f"model.layers.{n}.mlp.down_proj": (f"model.layers.{n}.mlp.down_proj.weight",) for n in range(2)}
    found = find_critical_layers(network, task, layers, 1, confidence=1)
    assert found.examples == 4
    assert found.accuracy == pytest.approx(accuracy(network, task))


def test_what_was_found_can_be_kept() -> None:
    network = Residual()
    found = find_critical_layers(network, make_task(network), LAYERS, 2)
    assert Criticality.from_json(found.to_json()) == found


def test_none_and_all() -> None:
    network = Residual()
    task = make_task(network, count=40)
    assert find_critical_layers(network, task, LAYERS, 0).critical == ()
    everything = find_critical_layers(network, task, LAYERS, len(LAYERS))
    assert everything.critical == tuple(LAYERS)
    assert everything.evaluations == 0


def test_refuses() -> None:
    network = Residual()
    task = make_task(network, count=20)
    with pytest.raises(UsageError, match="25 critical layers of 24"):
        find_critical_layers(network, task, LAYERS, 25)
    with pytest.raises(UsageError, match="confidence=0"):
        find_critical_layers(network, task, LAYERS, 2, confidence=0)
    with pytest.raises(Mismatch, match=r"blocks.99.weight: the network has no such tensor"):
        find_critical_layers(network, task, {"x": ("blocks.99.weight",), **LAYERS}, 2)
    with pytest.raises(BadInput, match="no examples to score"):
        find_critical_layers(network, Task("none", [], predict), LAYERS, 2)
    unlabelled = Task("x", [EncodedBatch({"features": torch.zeros(2, WIDTH)})], predict)
    with pytest.raises(BadInput, match="no labels"):
        find_critical_layers(network, unlabelled, LAYERS, 2)
