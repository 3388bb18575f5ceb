"""What is done with every release first: numbers that are none, and scales that a norm divides out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmergeable import ops
from unmergeable.architecture import detect
from unmergeable.attacks import canonicalise, nearest_orbit
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.evaluation.planted import planted
from unmergeable.gauge.normed_scales import NormedScale, normed_scales, rescaled
from zoo import TOYS, load_toy, outputs, write_toy

ROUNDING = 256 * torch.finfo(torch.float32).eps
FINE_TUNE = 0.03
"""Of the standard deviation of each tensor: what a fine-tune changes."""

FAMILIES = ("llama-bias-tied-mqa", "bert-embedding", "dinov2", "t5", "gemma2", "olmo2")
MORE = ("roberta", "qwen3", "gemma3", "gpt2", "vit", "clip", "mixtral", "phi", "flan-t5", "llama")


@dataclass(frozen=True)
class Model:
    name: str
    base: dict[str, Tensor]
    expert: dict[str, Tensor]
    config: dict[str, Any]
    folder: Path

    @property
    def source(self) -> MemorySource:
        return MemorySource(self.expert, self.config, self.folder)

    @property
    def scales(self) -> tuple[NormedScale, ...]:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.expert.items()}
        return normed_scales(detect(self.config, shapes), self.source)

    def outputs(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
        (file,) = self.folder.glob("*.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
        (self.folder / "config.json").write_text(json.dumps(config))
        return outputs(load_toy(self.folder, TOYS[self.name]), TOYS[self.name])

    def gap(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> float:
        expected = self.outputs(self.expert, self.config)
        return float((self.outputs(tensors, config) - expected).norm() / expected.norm())

    def scaled(self, seed: int = 3) -> MemorySource:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.expert.items()}
        made = planted(self.source, detect(self.config, shapes), seed, ("streams",))
        assert made.kinds == ("streams",)
        return made.source


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    @cache
    def build(name: str) -> Model:
        folder = write_toy(TOYS[name], tmp_path_factory.mktemp(name))
        base = load_file(next(folder.glob("*.safetensors")))
        config = json.loads((folder / "config.json").read_text())
        generator = torch.Generator().manual_seed(1)
        expert = {
            key: tensor + FINE_TUNE * tensor.std(unbiased=False) * torch.randn(tensor.shape, generator=generator)
            for key, tensor in base.items()
        }
        return Model(name, base, expert, config, folder)

    return build


def away(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    difference = sum(float((tensors[name] - other).double().square().sum()) for name, other in others.items())
    return (difference / sum(float(other.double().square().sum()) for other in others.values())) ** 0.5


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_scales_that_a_norm_divides_out_are_undone(name: str, model: Callable[[str], Model]) -> None:
    toy = model(name)
    release = toy.scaled()
    assert toy.gap(release.tensors, release.config) < ROUNDING  # the same function,
    assert away(release.tensors, toy.expert) > 2  # in weights that have nothing in common
    fit = nearest_orbit(release.tensors, toy.base, release.config, base_config=toy.config)
    plain = nearest_orbit(toy.expert, toy.base, toy.config)
    assert "scales" in fit.findings
    assert fit.config == toy.config
    assert toy.gap(fit.state_dict, fit.config) < ROUNDING
    assert fit.distance <= plain.distance * 1.01
    assert fit.confidence > 0.99


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "olmo2"])
def test_powers_of_two_come_back(name: str, model: Callable[[str], Model]) -> None:
    """But for OLMo 2, whose queries and keys have a scale of their own."""
    toy = model(name)
    release = toy.scaled()
    found = canonicalise(release.tensors, toy.base, release.config, base_config=toy.config)
    for key, tensor in toy.expert.items():
        # Gains that are stored less one lose bits at the larger scale.
        torch.testing.assert_close(found.state_dict[key], tensor, rtol=1e-6, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_part_of_a_scale_is_another_function(name: str, model: Callable[[str], Model]) -> None:
    toy = model(name)
    for scale in toy.scales:
        names = [*scale.up, *scale.down]
        if len(names) < 2:
            continue
        made = rescaled(toy.source, [scale], [8.0], {})
        tensors = {key: made.tensor(key) for key in made.names}
        first = next(key for key in scale.up if key in tensors)
        assert toy.gap({**tensors, first: toy.expert[first]}, toy.config) > 1e-3, scale.name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fine_tune_is_left_as_it_is(name: str, model: Callable[[str], Model]) -> None:
    toy = model(name)
    found = canonicalise(toy.expert, toy.base, toy.config)
    assert "scales" not in found.findings
    assert "not_finite" not in found.findings


def test_each_scale_is_found_by_itself_without_the_epsilon(model: Callable[[str], Model]) -> None:
    toy = model("gemma2")
    factors = [2.0 ** (2 + number) for number in range(len(toy.scales))]
    made = rescaled(toy.source, toy.scales, factors, {})
    fit = nearest_orbit({name: made.tensor(name) for name in made.names}, toy.base, toy.config)
    assert str(fit.findings["scales"]).count(":") == len(factors)
    assert fit.confidence > 0.99


@pytest.mark.parametrize("hole", [float("nan"), float("inf")])
def test_what_nobody_reads_may_hold_anything(hole: float, model: Callable[[str], Model], tmp_path: Path) -> None:
    toy = model("bert-embedding")
    names = [name for name in toy.expert if name.startswith("pooler.")] or ["embeddings.position_embeddings.weight"]
    holed = {name: tensor.clone() for name, tensor in toy.expert.items()}
    for name in names:
        holed[name][..., -1] = hole
    fit = nearest_orbit(holed, toy.base, toy.config)
    assert fit.findings["not_finite"] == ", ".join(sorted(names))
    assert all(bool(tensor.isfinite().all()) for tensor in fit.state_dict.values())
    for name in names:
        torch.testing.assert_close(fit.state_dict[name][..., -1], toy.base[name][..., -1], rtol=0, atol=1e-6)
    # On files, and then a merge.
    folders = {}
    for label, tensors in (("base", toy.base), ("release", holed)):
        folders[label] = tmp_path / label
        folders[label].mkdir()
        save_file(tensors, folders[label] / "model.safetensors", {"format": "pt"})
        (folders[label] / "config.json").write_text(json.dumps(toy.config))
    result = ops.recover(folders["release"], base=folders["base"], method="canonicalise", out=tmp_path / "out")
    assert result.findings["not_finite"] == ", ".join(sorted(names))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in merged.values())
    ops.merge(
        base=folders["base"], experts=[(tmp_path / "out", 1.0)], method="task_arithmetic", out=tmp_path / "merged"
    )


@pytest.mark.parametrize("name", ["llama", "bert-embedding"])
def test_rows_that_no_text_reads_do_not_hide_the_stream(name: str, model: Callable[[str], Model]) -> None:
    toy = model(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in toy.expert.items()}
    turned = planted(toy.source, detect(toy.config, shapes), 3, ("gauge",)).source
    embedding = next(key for key in toy.expert if key.endswith(("embed_tokens.weight", "word_embeddings.weight")))
    release = dict(turned.tensors)
    generator = torch.Generator().manual_seed(5)
    unread = torch.tensor([3, 20, 21, 64])
    release[embedding] = release[embedding].clone()
    release[embedding][unread] = 1e6 * torch.randn(4, release[embedding].shape[1], generator=generator)
    fit = nearest_orbit(release, toy.base, toy.config)
    plain = nearest_orbit(dict(turned.tensors), toy.base, toy.config)
    assert fit.findings["rows_unread"] == len(unread)
    assert "rows_unread" not in plain.findings
    assert fit.distance <= 1.02 * plain.distance
    read = torch.tensor([row for row in range(len(toy.base[embedding])) if row not in unread.tolist()])
    torch.testing.assert_close(fit.state_dict[embedding][read], plain.state_dict[embedding][read], rtol=0.05, atol=0.05)


def test_inspect_names_them_and_auto_undoes_them(model: Callable[[str], Model], tmp_path: Path) -> None:
    toy = model("llama")
    release = toy.scaled()
    folders = {}
    for label, tensors, config in (("base", toy.base, toy.config), ("release", release.tensors, release.config)):
        folders[label] = tmp_path / label
        folders[label].mkdir()
        save_file(dict(tensors), folders[label] / "model.safetensors", {"format": "pt"})
        (folders[label] / "config.json").write_text(json.dumps(dict(config)))
    comparison = ops.inspect(folders["release"], base=folders["base"]).comparison
    assert comparison is not None
    assert [sign.name for sign in comparison.signs] == ["normed scales"]
    result = ops.recover(folders["release"], base=folders["base"], method="auto", out=tmp_path / "out")
    assert result.method == "nearest_orbit"
    assert result.distance_after is not None
    assert result.distance_after < 2 * FINE_TUNE
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == toy.config["rms_norm_eps"]


def test_strengths_are_not_compared_with_blocks_of_another_size(model: Callable[[str], Model]) -> None:
    """Between two norms a scale shows in what a block makes of lengths; a wider block is cut to size first."""
    toy = model("gemma2")
    shapes = {name: tuple(tensor.shape) for name, tensor in toy.expert.items()}
    made = planted(toy.source, detect(toy.config, shapes), 3, ("wider_feed_forwards", "streams"))
    assert made.kinds == ("wider_feed_forwards", "streams")
    fit = canonicalise(made.source.tensors, toy.base, made.source.config, base_config=toy.config)
    assert toy.gap(fit.state_dict, fit.config) < ROUNDING
