"""The diagonal Fisher information against its definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from network.small_classifier import CLASSES, Classifier, make_task
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges.fisher import diagonal_fisher, sample_classes
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task
from unmergeable.randomness import Stream
from zoo import TOYS, write_toy

COUNT = 10


def squared_gradients(network: Classifier, features: Tensor, label: int) -> dict[str, Tensor]:
    """Of the log-likelihood of one label for one example."""
    network.zero_grad()
    torch.log_softmax(network(features[None]), dim=-1)[0, label].backward()
    return {name: parameter.grad.square() for name, parameter in network.named_parameters()}


def test_expected_labels_give_the_definition() -> None:
    network, task = Classifier(), make_task(COUNT, 4, labels=False)
    found = diagonal_fisher(network, task, labels="expected")
    assert all(parameter.grad is None for parameter in network.parameters())
    expected = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for batch in task.batches:
        for features in batch.inputs["features"]:
            probabilities = torch.softmax(network(features), dim=-1).detach()
            for label in range(CLASSES):
                for name, square in squared_gradients(network, features, label).items():
                    expected[name] += probabilities[label] * square / COUNT
    for name, fisher in found.items():
        # Sums of COUNT * CLASSES squares in float32, each of a gradient rounded to it.
        assert fisher.dtype == torch.float32
        assert torch.allclose(fisher.double(), expected[name], rtol=COUNT * CLASSES * 2**-23, atol=1e-12)


def test_empirical_labels_are_the_datas() -> None:
    network, task = Classifier(), make_task(COUNT, 3)
    found = diagonal_fisher(network, task, labels="empirical")
    expected = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for batch in task.batches:
        assert batch.labels is not None
        for features, label in zip(batch.inputs["features"], batch.labels.tolist(), strict=True):
            for name, square in squared_gradients(network, features, label).items():
                expected[name] += square / COUNT
    for name, fisher in found.items():
        assert torch.allclose(fisher.double(), expected[name], rtol=COUNT * 2**-22, atol=1e-12)
    # Control: the square of a batch's mean gradient is something else.
    network.zero_grad()
    (batch,) = make_task(COUNT, COUNT).batches
    torch.nn.functional.cross_entropy(network(batch.inputs["features"]), batch.labels).backward()
    assert not torch.allclose(found["inner.weight"].double(), network.inner.weight.grad.square(), rtol=0.1)


def test_sampled_labels_approach_the_expectation() -> None:
    network = Classifier()
    exact = diagonal_fisher(network, make_task(COUNT, 4), labels="expected")
    draws = [diagonal_fisher(network, make_task(COUNT, 4), labels="sampled", seed=seed) for seed in range(60)]
    assert not torch.equal(draws[0]["outer.bias"], draws[1]["outer.bias"])
    again = diagonal_fisher(network, make_task(COUNT, 2), labels="sampled", seed=0)
    assert all(torch.equal(again[name], draws[0][name]) for name in again)  # however they are batched
    for name, fisher in exact.items():
        values = torch.stack([draw[name] for draw in draws]).double()
        error = values.std(dim=0) / len(draws) ** 0.5
        # 59 weights are compared: five standard errors are passed by chance once in ten thousand runs of seeds.
        assert bool(((values.mean(dim=0) - fisher).abs() <= 5 * error + 1e-9).all())


def test_classes_are_drawn_with_their_probabilities() -> None:
    probabilities = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).expand(20_000, 4)
    drawn = sample_classes(probabilities.log(), Stream.from_seed(0))
    counts = torch.bincount(drawn, minlength=4) / len(drawn)
    assert counts[1] == 0
    assert torch.allclose(counts, probabilities[0], atol=5 * (0.25 / 20_000) ** 0.5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "vit"])
def test_names_and_shapes_are_those_on_disk(name: str, tmp_path: Path) -> None:
    toy = TOYS[name]
    folder = write_toy(toy, tmp_path)
    stored = load_file(folder / "model.safetensors")
    network = load_network(folder)
    batch = EncodedBatch(toy.inputs(torch.Generator().manual_seed(0)))
    fisher = diagonal_fisher(network, Task("toy", [batch]))
    floating = [n for n, tensor in stored.items() if tensor.is_floating_point()]
    assert all(fisher[n].shape == stored[n].shape for n in floating)
    assert all(bool((fisher[n] >= 0).all()) for n in floating)
    assert sum(float(fisher[n].sum()) for n in floating) > 0


def test_a_text_has_too_many_labels_to_expect(tmp_path: Path) -> None:
    toy = TOYS["gpt2"]
    network = load_network(write_toy(toy, tmp_path))
    batch = EncodedBatch(toy.inputs(torch.Generator().manual_seed(0)))
    with pytest.raises(UsageError, match="a text has many; use labels=sampled"):
        diagonal_fisher(network, Task("toy", [batch]), labels="expected")


def test_refuses() -> None:
    network = Classifier()
    with pytest.raises(UsageError, match="labels=true: must be one of sampled, expected, empirical"):
        diagonal_fisher(network, make_task(2, 1), labels="true")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="the data have no labels"):
        diagonal_fisher(network, make_task(2, 1, labels=False), labels="empirical")
    with pytest.raises(BadInput, match="task 0: no examples"):
        diagonal_fisher(network, make_task(0, 1))
    with torch.no_grad():
        network.inner.weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match=r"Fisher information on task 0 is not finite"):
        diagonal_fisher(network, make_task(2, 1), labels="empirical")
