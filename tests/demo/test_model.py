from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from unmergeable.demo.model import write_base_checkpoint
from unmergeable.errors import UsageError
from unmergeable.network.load import load_network

REFERENCE = json.loads((Path(__file__).parent / "backbone_activations.json").read_text())
"""Final hidden states of the packaged ONNX graph, computed once with onnxruntime (see the file's own fields)."""

BOUND = 64 * torch.finfo(torch.float32).eps * REFERENCE["largest_magnitude"]
"""Two float32 evaluations of 12 blocks that sum in different orders: a few eps for each of 24 residual branches."""


def reference_input() -> Tensor:
    places = np.arange(224)
    channels = [np.sin(0.05 * (c + 1) * places)[:, None] + np.cos(0.03 * (c + 2) * places)[None, :] for c in range(3)]
    return torch.from_numpy(np.stack(channels)[None].astype(np.float32))


@torch.no_grad()
def distance_to_reference(network: torch.nn.Module) -> float:
    hidden = network(pixel_values=reference_input()).last_hidden_state[0, :, ::8]
    return max(
        float((hidden[int(token)] - torch.tensor(row)).abs().max()) for token, row in REFERENCE["tokens"].items()
    )


def test_computes_what_the_packaged_graph_computes(base: Path) -> None:
    assert distance_to_reference(load_network(base)) < BOUND


@pytest.mark.parametrize("part", ["attention.v_proj", "attention.o_proj", "attention.q_proj"])
def test_one_matrix_the_wrong_way_round_would_show(base: Path, part: str) -> None:
    network = load_network(base)
    weight = network.encoder.layer[5].get_submodule(part).weight

    weight.data = weight.data.T.contiguous()

    assert distance_to_reference(network) > 100 * BOUND


def test_is_an_ordinary_checkpoint(base: Path) -> None:
    network, report = transformers.AutoModel.from_pretrained(
        base, trust_remote_code=False, local_files_only=True, output_loading_info=True
    )

    assert type(network) is transformers.Dinov2Model
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(parameter.numel() for parameter in network.parameters()) == 22_056_192


def test_is_float32_under_the_names_of_the_hub(base: Path) -> None:
    assert sorted(path.name for path in base.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(base / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118 - no mapping
        assert {
            "embeddings.cls_token",
            "embeddings.position_embeddings",
            "encoder.layer.11.attention.attention.query.weight",
            "encoder.layer.11.attention.output.dense.bias",
            "encoder.layer.11.layer_scale2.lambda1",
            "layernorm.bias",
        } <= set(file.keys())


def test_says_how_to_install_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)

    with pytest.raises(UsageError, match=r"pip install 'unmergeable\[demo\]'"):
        write_base_checkpoint(tmp_path / "base")
    assert not (tmp_path / "base").exists()
