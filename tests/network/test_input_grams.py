"""Second moments of the inputs of linear layers, against the inputs themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from network.small_classifier import FEATURES, Classifier, make_task
from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.input_grams import gather_input_grams, linear_layers
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


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("llama", {"model.layers.1.self_attn.q_proj.weight/1", "lm_head.weight/1"}),
        ("gpt2", {"transformer.h.0.attn.c_attn.weight/0", "transformer.h.1.mlp.c_proj.weight/0"}),
        ("vit", {"vit.encoder.layer.0.attention.attention.query.weight/1", "classifier.weight/1"}),
    ],
)
def test_keys_name_the_tensor_on_disk_and_its_axis(name: str, some: set[str], tmp_path: Path) -> None:
    network = load_network(write_toy(TOYS[name], tmp_path))
    layers = linear_layers(network)
    keys = [layer.key for layer in layers]
    assert some <= set(keys)
    assert keys == sorted(keys)
    assert not any("norm" in key or "bias" in key or "wte" in key or "embed" in key for key in keys)
    batch = EncodedBatch(TOYS[name].inputs(torch.Generator().manual_seed(0)))
    grams = dict(gather_input_grams(network, Task("toy", [batch])))
    assert [tuple(gram.shape) for gram in grams.values()] == [(layer.inputs, layer.inputs) for layer in layers]
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_an_embedding_that_is_an_output_too_has_none(tmp_path: Path) -> None:
    network = load_network(write_toy(TOYS["gpt2"], tmp_path))
    assert network.lm_head.weight is network.transformer.wte.weight
    assert not any("lm_head" in layer.name for layer in linear_layers(network))
    assert linear_layers(nn.Sequential(nn.Embedding(3, 4))) == ()


def test_refuses() -> None:
    network = Classifier()
    with pytest.raises(BadInput, match="task 0: no examples"):
        dict(gather_input_grams(network, make_task(0, 1)))
    with torch.no_grad():
        network.inner.weight.fill_(torch.nan)
    with pytest.raises(BadInput, match=r"outer.weight: its inputs on task 0 are not finite"):
        dict(gather_input_grams(network, make_task(2, 1)))
    assert not any(module._forward_pre_hooks for module in network.modules())
