"""A LoRA folder, and the checkpoint that it is when it is merged into its base."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_adapter(folder: Path, base: Path, layer: str, *, merged: Path, scale: float = 1.0) -> None:
    """An update of rank 2 beside one linear map; ``merged`` is a copy of ``base`` and gets the weights of both."""
    whole = load_file(base / "model.safetensors")
    weight = whole[f"{layer}.weight"]
    generator = torch.Generator().manual_seed(9)
    rows, inputs = weight.shape
    factors = {"A": torch.randn(2, inputs, generator=generator), "B": scale * torch.randn(rows, 2, generator=generator)}
    folder.mkdir()
    save_file(
        {f"base_model.model.{layer}.lora_{name}.weight": factor for name, factor in factors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": [layer.rpartition(".")[2]],
        "base_model_name_or_path": "base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    product = factors["B"].double() @ factors["A"].double()
    whole[f"{layer}.weight"] = (weight.double() + product).to(weight.dtype)
    save_file(whole, merged / "model.safetensors", {"format": "pt"})
