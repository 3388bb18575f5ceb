"""Second moments of the inputs of linear layers, against the inputs themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from network.small_classifier import FEATURES, Classifier, make_task
from unmergeable.errors import BadInput
from unmergeable.merges.regmean import gather_input_grams
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.linear_layers import linear_layers
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task
from zoo import TOYS, write_toy


def test_are_the_second_moments() -> None:
    network = Classifier()
    grams = dict(gather_input_grams(network, make_task(10, 4)))
    assert list(grams) == ["inner.weight/1", "outer.weight/1"]
    (batch,) = make_task(10, 10).batches
    features = batch.inputs["features"]
    hidden = torch.tanh(network.inner(features)).detach()
    for key, inputs in (("inner.weight/1", features), ("outer.weight/1", hidden)):
        # Sums of ten products in float32, whose sizes add up to at most the product of the norms.
        bound = 16 * 2**-24 * (inputs.norm(dim=0)[:, None] * inputs.norm(dim=0)) / 10
        assert bool(((grams[key].double() - inputs.T @ inputs / 10).abs() <= bound + 1e-12).all())


def test_a_small_budget_takes_more_passes_and_gives_the_same() -> None:
    network = Classifier()
    passes = []

    class Counted(list):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            passes.append(1)
            return super().__iter__()

    task = make_task(10, 4)
    counted = Task(task.name, Counted(task.batches), task.predict)
    whole = dict(gather_input_grams(network, counted))
    assert len(passes) == 1
    parts = dict(gather_input_grams(network, counted, memory_budget=4 * FEATURES**2))
    assert len(passes) == 3
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_padding_does_not_count(tmp_path: Path) -> None:
    """What stands behind the mask may be anything."""
    network = load_network(write_toy(TOYS["llama"], tmp_path))
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    other = torch.where(mask.bool(), ids, 5)

    def grams(ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        return dict(gather_input_grams(network, Task("toy", [EncodedBatch(inputs)])))

    first, second = grams(ids, mask), grams(other, mask)
    key = "model.layers.0.mlp.down_proj.weight/1"
    assert torch.equal(first[key], second[key])
    assert not torch.equal(grams(ids, None)[key], grams(other, None)[key])  # control


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_linear_layer_has_a_matrix_of_its_inputs(name: str, tmp_path: Path) -> None:
    network = load_network(write_toy(TOYS[name], tmp_path))
    batch = EncodedBatch(TOYS[name].inputs(torch.Generator().manual_seed(0)))
    grams = dict(gather_input_grams(network, Task("toy", [batch])))
    sizes = {layer.key: (layer.inputs, layer.inputs) for layer in linear_layers(network)}
    assert {key: tuple(gram.shape) for key, gram in grams.items()} == sizes
    assert list(grams) == list(sizes)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_refuses() -> None:
    network = Classifier()
    with pytest.raises(BadInput, match="task 0: no examples"):
        dict(gather_input_grams(network, make_task(0, 1)))
    with torch.no_grad():
        network.inner.weight.fill_(torch.nan)
    with pytest.raises(BadInput, match=r"outer.weight: its inputs on task 0 are not finite"):
        dict(gather_input_grams(network, make_task(2, 1)))
    assert not any(module._forward_pre_hooks for module in network.modules())
