from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 28,
    "patch_size": 14,
    "use_mask_token": False,
    "house_note": "kept as it is",
}
SHAPES = {
    "embeddings.cls_token": (1, 1, 16),
    "embeddings.position_embeddings": (1, 5, 16),
    "embeddings.patch_embeddings.projection.weight": (16, 3, 14, 14),
    "embeddings.patch_embeddings.projection.bias": (16,),
    "layernorm.weight": (16,),
    "layernorm.bias": (16,),
}
for layer in range(2):
    prefix = f"encoder.layer.{layer}"
    for owner, wide, narrow in (
        ("attention.attention.query", 16, 16),
        ("attention.attention.key", 16, 16),
        ("attention.attention.value", 16, 16),
        ("attention.output.dense", 16, 16),
        ("mlp.fc1", 32, 16),
        ("mlp.fc2", 16, 32),
    ):
        SHAPES[f"{prefix}.{owner}.weight"] = (wide, narrow)
        SHAPES[f"{prefix}.{owner}.bias"] = (wide,)
    for owner in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
        SHAPES[f"{prefix}.{owner}"] = (16,)
    for owner in ("layer_scale1.lambda1", "layer_scale2.lambda1"):
        SHAPES[f"{prefix}.{owner}"] = (16,)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """A small vision transformer by its names on disk, every tensor random."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def folder(tmp_path: Path, tensors: Mapping[str, Tensor]) -> Path:
    place = tmp_path / "checkpoint"
    place.mkdir()
    save_file(dict(tensors), place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(CONFIG))
    return place
