"""What was planted in a release's structure is taken away, and the base's structure computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from attacks.planted import Build, Network
from unmergeable.architecture import detect
from unmergeable.attacks import Inputs, LosslessPruning, NearestOrbit, lossless_pruning
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import Mismatch
from unmergeable.evaluation.planted import KINDS, planted
from zoo import TOYS, load_toy, outputs

TOLERANCE = 256 * torch.finfo(torch.float32).eps
"""The release is stored in float32, and what is traded there is some ten times the weights."""

STRUCTURES = ("idle_layer", "split_layer", "wider_feed_forwards", "more_heads")
HIDDEN = (*STRUCTURES, *(kind for kind in KINDS if kind not in STRUCTURES and kind != "untied"))
COVERING = ("llama", "bert-embedding", "dinov2", "t5")
MORE = ("qwen3", "gemma2", "gpt2", "opt", "vit", "roberta", "flan-t5")
EVERY = [*COVERING, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


def released(network: Network, kinds: tuple[str, ...], seed: int = 1) -> tuple[MemorySource, tuple[str, ...]]:
    made = planted(network.expert(0.1), network.architecture, seed, kinds)
    return made.source, made.kinds


def pruned(network: Network, release: MemorySource) -> MemorySource:
    result = LosslessPruning().recover(Inputs(release, network.base, network.architecture)).template
    return MemorySource({name: result.tensor(name) for name in result.names}, result.config)


def output(name: str, source: MemorySource, folder: Path) -> torch.Tensor:
    folder.mkdir()
    save_file(dict(source.tensors), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(source.config)))
    return outputs(load_toy(folder, TOYS[name], torch.float64), TOYS[name])


@pytest.mark.parametrize("name", EVERY)
def test_planted_structure_is_taken_away(name: str, network: Build, tmp_path: Path) -> None:
    toy = network(name)
    expert = toy.expert(0.1)
    expected = output(name, expert, tmp_path / "expert")
    tried = 0
    for kind in STRUCTURES:
        for seed in (1, 2):
            release, done = released(toy, (kind,), seed)
            if not done:
                continue
            tried += 1
            result = pruned(toy, release)
            assert {key: tensor.shape for key, tensor in result.tensors.items()} == {
                key: tensor.shape for key, tensor in expert.tensors.items()
            }, kind
            gap = output(name, result, tmp_path / f"{kind}-{seed}") - expected
            assert float(gap.norm() / expected.norm()) <= TOLERANCE, kind
    assert tried >= 4


@pytest.mark.parametrize("name", EVERY)
def test_structure_hidden_under_trades_and_bases_comes_back_to_the_expert(name: str, network: Build) -> None:
    toy = network(name)
    expert = toy.expert(0.1)
    for seed in (1, 2):
        release, done = released(toy, HIDDEN, seed)
        assert len(done) > 3
        result = pruned(toy, release)
        estimate = NearestOrbit().estimate(result, toy.base, toy.architecture)
        template = estimate.template or result
        found = toy.transformed(
            MemorySource({key: template.tensor(key) for key in template.names}, result.config), *estimate.gauges
        )
        assert toy.distance(found) <= 1.02 * toy.distance(expert)


def test_what_does_something_is_not_taken_away(network: Build) -> None:
    """The control: one idle block's last weight is no longer zero, or no two units are alike."""
    toy = network("llama")
    for kind in ("idle_layer", "wider_feed_forwards", "more_heads"):
        release, _ = released(toy, (kind,))
        generator = torch.Generator().manual_seed(2)
        other = {
            key: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in release.tensors.items()
        }
        with pytest.raises(Mismatch, match="does something; run block_regression"):
            pruned(toy, MemorySource(other, release.config, Path("release")))


def test_a_release_of_the_bases_structure_stays_as_it_is(network: Build) -> None:
    toy = network("dinov2")
    expert = toy.expert(0.1)
    recovered = LosslessPruning().recover(Inputs(expert, toy.base, toy.architecture))
    assert recovered.template is expert
    assert recovered.findings == {"taken_away": "nothing"}


def test_in_memory(network: Build) -> None:
    toy = network("dinov2")
    release, _ = released(toy, ("idle_layer",))
    config: Any = toy.base.config
    result = lossless_pruning(release.tensors, toy.base.tensors, release.config, config)
    assert result.config["num_hidden_layers"] == config["num_hidden_layers"]
    shapes = {key: tuple(tensor.shape) for key, tensor in result.state_dict.items()}
    assert detect(result.config, shapes).family == toy.architecture.family
