"""Numbers in a config, traded against weights: the same network, and the base's numbers come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmergeable.architecture import detect
from unmergeable.attacks import Inputs
from unmergeable.attacks.prepared import prepared
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.gauge.config_scales import multipliers_of, with_config
from zoo import TOYS, load_toy, outputs, write_toy

ROUNDING = 64 * torch.finfo(torch.float32).eps


class Model:
    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, write_toy(TOYS[name], folder)
        tensors = load_file(next(self.folder.glob("*.safetensors")))
        self.source = MemorySource(tensors, json.loads((self.folder / "config.json").read_text()), self.folder)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        self.architecture = detect(self.source.config, shapes)

    def outputs(self, source: Any) -> Tensor:
        tensors = {name: source.tensor(name).contiguous().clone() for name in source.names}
        save_file(tensors, next(self.folder.glob("*.safetensors")), {"format": "pt"})
        (self.folder / "config.json").write_text(json.dumps(dict(source.config)))
        return outputs(load_toy(self.folder, TOYS[self.name]), TOYS[self.name])

    def gap(self, source: Any) -> float:
        expected = self.outputs(self.source)
        return float((self.outputs(source) - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    return cache(lambda name: Model(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_number_is_traded_against_the_weights_beside_it(name: str, model: Callable[[str], Model]) -> None:
    toy = model(name)
    wanted = {**toy.source.config, "query_pre_attn_scalar": 16 * toy.source.config["query_pre_attn_scalar"]}
    release = with_config(toy.source, toy.architecture, wanted)
    assert release is not None
    assert release.config == wanted
    assert toy.gap(release) <= ROUNDING
    alone = MemorySource(dict(toy.source.tensors), wanted, toy.folder)
    assert toy.gap(alone) > 1e-3, "control: without the weights it is another network"
    back = prepared(Inputs(release, toy.source, toy.architecture))
    assert back.found["config_scales"] == "query_pre_attn_scalar: 0.25"
    assert back.changes["query_pre_attn_scalar"] == toy.source.config["query_pre_attn_scalar"]
    for key, tensor in toy.source.tensors.items():
        torch.testing.assert_close(back.inputs.protected.tensor(key), tensor, rtol=1e-6, atol=1e-6)


def test_the_head_of_a_t5_takes_over_the_scale_of_its_decoder(model: Callable[[str], Model]) -> None:
    toy = model("t5")
    config, width = dict(toy.source.config), toy.source.config["d_model"]
    assert multipliers_of(config) == {"scale_decoder_outputs": pytest.approx(width**-0.5)}
    head = toy.source.tensors["shared.weight"] * width**-0.5
    apart = {**config, "tie_word_embeddings": False, "scale_decoder_outputs": False}
    release = MemorySource({**toy.source.tensors, "lm_head.weight": head}, apart, toy.folder)
    assert toy.gap(release) <= ROUNDING
    back = prepared(Inputs(release, toy.source, toy.architecture))
    assert back.changes == {"scale_decoder_outputs": True}
    torch.testing.assert_close(back.inputs.protected.tensor("lm_head.weight"), toy.source.tensors["shared.weight"])
    # Where the head is the embedding, both would change: it stays.
    assert with_config(toy.source, toy.architecture, apart) is None


def test_nothing_is_done_where_numbers_agree(model: Callable[[str], Model]) -> None:
    toy = model("gemma2")
    assert with_config(toy.source, toy.architecture, toy.source.config) is None
    assert not prepared(Inputs(toy.source, toy.source, toy.architecture)).found
