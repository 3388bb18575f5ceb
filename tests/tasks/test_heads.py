"""Heads: what they make of features, and the way to a file and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.tasks import FeatureHead, read_head, write_head
from unmergeable.tasks.heads import Pooling

CLASSES, HIDDEN = 4, 6
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT, BIAS = torch.randn(CLASSES, HIDDEN, generator=GENERATOR), torch.randn(CLASSES, generator=GENERATOR)
STATES = torch.randn(2, 3, HIDDEN, generator=GENERATOR)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def network(**inputs: Any) -> Any:
    return SimpleNamespace(last_hidden_state=STATES, pooler_output=-STATES[:, 0])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("first", STATES[:, 0]),
        ("rest", (STATES[:, 1] + STATES[:, 2]) / 2),
        ("mean", torch.stack([STATES[0].mean(dim=0), (STATES[1, 0] + STATES[1, 1]) / 2])),
        ("pooler", -STATES[:, 0]),
    ],
)
def test_pooling(pooling: Pooling, expected: torch.Tensor) -> None:
    features = FeatureHead(WEIGHT, pooling=pooling).features(network, EncodedBatch({"attention_mask": MASK}))
    torch.testing.assert_close(features, expected)


def test_a_linear_head() -> None:
    expected = STATES[:, 0].numpy() @ WEIGHT.numpy().T + BIAS.numpy()
    logits = FeatureHead(WEIGHT, BIAS).predict(network, EncodedBatch({})).logits
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-5)


def test_a_cosine_head_knows_directions_only() -> None:
    head = FeatureHead(WEIGHT, temperature=0.02)
    features = STATES[:, 0]
    cosines = torch.cosine_similarity(features[:, None], WEIGHT[None], dim=-1)
    torch.testing.assert_close(head.logits(features), cosines / 0.02, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(head.logits(30 * features), head.logits(features), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(FeatureHead(WEIGHT).logits(30 * features), FeatureHead(WEIGHT).logits(features))


@pytest.mark.parametrize(
    "head",
    [
        FeatureHead(WEIGHT),
        FeatureHead(WEIGHT, BIAS, "pooler"),
        FeatureHead(WEIGHT, pooling="rest", temperature=0.1 + 0.2),
    ],
)
def test_a_head_is_read_as_it_was_written(tmp_path: Path, head: FeatureHead) -> None:
    write_head(head, tmp_path / "head.safetensors")
    again = read_head(tmp_path / "head.safetensors")
    assert (again.pooling, again.temperature) == (head.pooling, head.temperature)
    assert torch.equal(again.weight, head.weight)
    assert (again.bias is None) == (head.bias is None)
    if head.bias is not None and again.bias is not None:
        assert torch.equal(again.bias, head.bias)


@pytest.mark.parametrize("content", [None, b"", b"\x00" * 64])
def test_something_else_is_not_a_head(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "head.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match="not a head"):
        read_head(path)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"weights": WEIGHT}, {}),
        ({"weight": BIAS}, {}),
        ({"weight": WEIGHT, "bias": WEIGHT[0]}, {}),
        ({"weight": WEIGHT}, {"pooling": "last"}),
        ({"weight": WEIGHT}, {"temperature": "warm"}),
    ],
)
def test_a_file_of_other_tensors_is_not_a_head(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x", metadata)
    with pytest.raises(BadInput):
        read_head(tmp_path / "x")


def test_features_of_another_network_are_refused() -> None:
    head = FeatureHead(WEIGHT)
    with pytest.raises(BadInput, match="reads 5 features and function gives 6"):
        replace(head, weight=WEIGHT[:, :5]).predict(network, EncodedBatch({}))
    with pytest.raises(BadInput, match="gives no pooler_output"):
        replace(head, pooling="pooler").predict(lambda: SimpleNamespace(last_hidden_state=STATES), EncodedBatch({}))
