"""The linear layers of a network, by their names on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from unmergeable.network.linear_layers import linear_layers
from unmergeable.network.load import load_network
from zoo import TOYS, write_toy


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


def test_an_embedding_that_is_an_output_too_has_none(tmp_path: Path) -> None:
    network = load_network(write_toy(TOYS["gpt2"], tmp_path))
    assert network.lm_head.weight is network.transformer.wte.weight
    assert not any("lm_head" in layer.name for layer in linear_layers(network))
    assert linear_layers(nn.Sequential(nn.Embedding(3, 4))) == ()
