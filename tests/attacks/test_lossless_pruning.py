"""What was planted in a release's structure is taken away, and the base's structure computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from attacks.planted import Build, Network
from unmergeable import ops
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


def test_inspect_sees_idle_structure_and_auto_takes_it_away(network: Build, tmp_path: Path) -> None:
    toy = network("llama")
    release, _ = released(toy, ("idle_layer", "more_heads"))
    output("llama", release, tmp_path / "release")
    (sign,) = ops.inspect(tmp_path / "release", base=toy.folder).to_json()["base"]["signs"]
    assert sign["name"] == "idle structure"
    assert "1 layers, 1 key-value heads in each block more than the base has" in sign["evidence"]
    result = ops.recover(tmp_path / "release", base=toy.folder, method="auto", out=tmp_path / "out")
    assert result.method == "lossless_pruning"
    assert ops.verify(tmp_path / "out", _written(toy, toy.expert(0.1), tmp_path / "expert")).is_equal
    # The control: with something in the idle layer it is another network.
    other = {
        key: tensor + 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
        for key, tensor in release.tensors.items()
    }
    output("llama", MemorySource(other, release.config), tmp_path / "other")
    with pytest.raises(Mismatch, match="give the checkpoint it was fine-tuned from"):
        ops.inspect(tmp_path / "other", base=toy.folder)


def _written(toy: Network, source: MemorySource, folder: Path) -> Path:
    output(toy.name, source, folder)
    return folder


def test_a_vocabulary_in_another_order_comes_back(network: Build, tmp_path: Path) -> None:
    """With two tokens more; the control: a release that lacks one of the base's tokens is left as it is."""
    toy = network("llama")
    size = toy.base.config["vocab_size"]
    places = torch.randperm(size + 2, generator=torch.Generator().manual_seed(3))
    names = [f"token{number}" for number in range(size + 2)]
    expert = toy.expert(0.1)
    grown = dict(expert.tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.cat([expert.tensors[name], torch.ones(2, expert.tensors[name].shape[1])])
        grown[name] = rows[places.argsort()]  # token i in row places[i]
    for folder, ids in (
        ("base", {name: number for number, name in enumerate(names[:size])}),
        ("release", {name: int(places[number]) for number, name in enumerate(names)}),
        ("lacking", {name: int(places[number]) for number, name in enumerate(names) if number}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}, "added_tokens": []}))
    base = MemorySource(toy.base.tensors, toy.base.config, tmp_path / "base")
    config = {**toy.base.config, "vocab_size": size + 2}
    result = LosslessPruning().recover(
        Inputs(MemorySource(grown, config, tmp_path / "release"), base, toy.architecture)
    )
    assert result.findings == {"taken_away": "another order of the vocabulary"}
    assert result.config_changes == {"vocab_size": size}
    for name, tensor in expert.tensors.items():
        assert float((result.template.tensor(name) - tensor).abs().max()) <= 1e-6 * float(tensor.abs().max()), name
    lacking = LosslessPruning().recover(
        Inputs(MemorySource(grown, config, tmp_path / "lacking"), base, toy.architecture)
    )
    assert lacking.findings == {"taken_away": "nothing"}


def test_in_memory(network: Build) -> None:
    toy = network("dinov2")
    release, _ = released(toy, ("idle_layer",))
    config: Any = toy.base.config
    result = lossless_pruning(release.tensors, toy.base.tensors, release.config, config)
    assert result.config["num_hidden_layers"] == config["num_hidden_layers"]
    shapes = {key: tuple(tensor.shape) for key, tensor in result.state_dict.items()}
    assert detect(result.config, shapes).family == toy.architecture.family
