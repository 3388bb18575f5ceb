"""Planted rewrites load with plain from_pretrained, compute the same, and are far from the original weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from unmergeable.architecture import Architecture, detect
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.evaluation.planted import KINDS, STRUCTURES, Planted, planted
from zoo import TOYS, load_toy, outputs, write_toy

TOLERANCE = 64 * torch.finfo(torch.float32).eps
"""Norms, softmax and rotary tables of transformers are computed in float32; what is planted is many times larger."""

GPT = {"value_bias", "key_bias", "norm_bias", "norm_gain", "unseen_reading", "unseen_writing", "gauge", "scales"}
BERT = {"value_bias", "key_bias", "norm_bias", "unseen_reading", "unseen_writing", "gauge", "scales"}
RMS = {"norm_gain", "gauge", "scales"}
WIDER = {"wider_feed_forwards", "turned_units"}
HEADS = {"more_heads", "split_heads", "wider_heads"}
DEEPER = {"idle_layer", "split_layer"} | WIDER

UNSAID_EPSILON = {"opt", "opt-350m-like"}
"""Families whose config does not say what the norms add to the variance, so that streams cannot be scaled exactly."""

EXPECTED = {
    "llama": RMS | DEEPER | HEADS,
    "llama-bias-tied-mqa": RMS | DEEPER | HEADS | {"untied", "value_bias"},
    "qwen3": RMS | DEEPER | {"split_heads"} | {"more_heads"},
    "gemma2": RMS | DEEPER | HEADS | {"untied", "config"},
    "phi": GPT | {"summed_rows"},
    "gpt2": GPT | DEEPER | {"saturated_units"},
    "opt": GPT | DEEPER | {"saturated_units"},
    "opt-350m-like": BERT | WIDER | {"saturated_units"},
    "mixtral": RMS | {"router"},
    "bert-embedding": BERT | DEEPER | {"saturated_units", "summed_rows"},
    "roberta": BERT | DEEPER | {"saturated_units", "summed_rows"},
    "vit": GPT | DEEPER | {"saturated_units", "summed_rows"},
    "dinov2": GPT | DEEPER | {"layer_scale", "saturated_units", "summed_rows"},
    "clip": GPT | {"summed_rows"},
    "t5": RMS | WIDER | HEADS | {"position_bias"},
    "flan-t5": RMS | WIDER | HEADS | {"position_bias"},
}
QUICK = ("llama-bias-tied-mqa", "bert-embedding", "dinov2", "t5")


@dataclass(frozen=True)
class Model:
    name: str
    source: MemorySource
    architecture: Architecture
    folder: Path
    expected: Tensor

    def gap(self, tensors: dict[str, Tensor], config: object) -> float:
        (file,) = self.folder.glob("*.safetensors")
        save_file(tensors, file, {"format": "pt"})
        (self.folder / "config.json").write_text(json.dumps(config))
        computed = outputs(load_toy(self.folder, TOYS[self.name], torch.float64), TOYS[self.name])
        return float((computed - self.expected).norm() / self.expected.norm())

    def planted(self, *kinds: str, seed: int = 1) -> Planted:
        return planted(self.source, self.architecture, seed, kinds or KINDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    @cache
    def build(name: str) -> Model:
        folder = write_toy(TOYS[name], tmp_path_factory.mktemp(name), dtype=torch.float64)
        tensors = load_file(next(folder.glob("*.safetensors")))
        config = json.loads((folder / "config.json").read_text())
        architecture = detect(config, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        expected = outputs(load_toy(folder, TOYS[name], torch.float64), TOYS[name])
        return Model(name, MemorySource(tensors, config, folder), architecture, folder, expected)

    return build


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXPECTED]
)
def test_whatever_is_planted_computes_the_same(name: str, model: Callable[[str], Model]) -> None:
    toy = model(name)
    done = set()
    for kind in KINDS:
        made = toy.planted(kind)
        assert made.kinds in ((), (kind,))
        if made.kinds:
            done.add(kind)
            assert toy.gap(dict(made.source.tensors), made.source.config) <= TOLERANCE, kind
    assert done == EXPECTED[name] | (set() if name in UNSAID_EPSILON else {"streams"})
    for seed in (2, 3):
        made = toy.planted(seed=seed)
        assert set(made.kinds) == done
        assert toy.gap(dict(made.source.tensors), made.source.config) <= TOLERANCE


@pytest.mark.parametrize("name", QUICK)
def test_half_of_what_is_planted_is_another_function(name: str, model: Callable[[str], Model]) -> None:
    toy = model(name)
    for kind in toy.planted().kinds:
        made = toy.planted(kind).source
        changed = [key for key, tensor in made.tensors.items() if not torch.equal(tensor, _original(toy, key, tensor))]
        assert changed, kind
        if kind == "untied":
            continue
        broken = {key: tensor.clone() for key, tensor in made.tensors.items()}
        for key in changed[:: max(1, len(changed) // 4)]:
            broken[key] = torch.where(broken[key] == 0, 0.3, 1.3 * broken[key])
        assert toy.gap(broken, made.config) > 1e-4, kind


def _original(toy: Model, key: str, tensor: Tensor) -> Tensor:
    own = toy.source.tensors.get(key)
    return torch.zeros_like(tensor) if own is None or own.shape != tensor.shape else own


def test_the_seed_decides_what_is_planted(model: Callable[[str], Model]) -> None:
    toy = model("dinov2")
    first, again, other = (toy.planted(seed=seed).source.tensors for seed in (5, 5, 6))
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    assert any(key not in other or not torch.equal(tensor, other[key]) for key, tensor in first.items())


def test_no_unit_that_was_turned_round_is_left_as_it_was(model: Callable[[str], Model]) -> None:
    """Half as many as are added are gone from the block, and no other has their direction; the rest are there."""
    for name in ("llama", "dinov2"):
        toy = model(name)
        made = toy.planted("turned_units").source
        block = toy.architecture.feed_forwards[0]
        reading = block.up if block.gate is None else block.gate
        before, after = (tensors[reading.weight].double() for tensors in (toy.source.tensors, made.tensors))
        likeness = functional.normalize(before, dim=1) @ functional.normalize(after, dim=1).T
        gone = likeness.amax(dim=1) < 1 - 1e-6
        added = len(after) - len(before)
        assert added > 0
        assert int(gone.sum()) == added // 2, "control: all others are as they were"


def test_structures_are_seen_in_the_config_and_rewrites_are_not(model: Callable[[str], Model]) -> None:
    toy = model("llama")
    for kind in toy.planted().kinds:
        made = toy.planted(kind).source
        is_said = kind in STRUCTURES or kind == "streams"  # whose epsilon is said
        assert (made.config != toy.source.config) == is_said
    assert toy.planted("idle_layer").source.config["num_hidden_layers"] == 3
