"""A base is found under its expert's names, however it was saved, and in a larger network that holds it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmergeable.errors import Mismatch
from unmergeable.ops.opened import open_base, open_with_architecture
from zoo import TOYS, write_toy

State = dict[str, torch.Tensor]
Save = Callable[[State], State]
Configure = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(TOYS["llama"], tmp_path_factory.mktemp("llama") / "expert")


def saved_again(expert: Path, out: Path, change: Save, **config: Any) -> Path:
    shutil.copytree(expert, out)
    save_file(change(load_file(expert / "model.safetensors")), out / "model.safetensors", {"format": "pt"})
    document = json.loads((expert / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config["config"](document) if config else document))
    return out


def renamed(change: Callable[[str], str]) -> Save:
    return lambda state: {change(name): tensor for name, tensor in state.items()}


def whole(state: State) -> State:
    tower = {f"vision_tower.layers.{number}.mlp.up_proj.weight": torch.ones(3, 3) for number in range(5)}
    return renamed(lambda name: f"language_model.{name}")(state) | tower


SAVED: dict[str, tuple[Save, Configure]] = {
    "as it is": (dict, dict),
    "without a prefix": (renamed(lambda name: name.removeprefix("model.")), dict),
    "wrapped": (renamed(lambda name: f"_orig_mod.{name}"), dict),
    "part of a whole": (whole, lambda config: {"model_type": "llava", "text_config": config}),
    "a taller vocabulary": (
        lambda state: {n: torch.cat([t, t[:3]]) if "embed" in n or "lm_head" in n else t for n, t in state.items()},
        dict,
    ),
}


@pytest.mark.parametrize(("save", "config"), SAVED.values(), ids=SAVED)
def test_a_base(save: Save, config: Configure, expert: Path, tmp_path: Path) -> None:
    source, architecture = open_with_architecture(expert)
    base = open_base(saved_again(expert, tmp_path / "base", save, config=config), source, architecture)
    for name in source.names:
        if "embed" not in name and "lm_head" not in name:
            assert torch.equal(base.tensor(name), source.tensor(name)), name


def test_another_network(expert: Path, tmp_path: Path) -> None:
    source, architecture = open_with_architecture(expert)

    def refused(save: Save, config: Configure, message: str) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(Mismatch, match=message):
            open_base(saved_again(expert, folder, save, config=config), source, architecture)

    refused(dict, lambda config: config | {"model_type": "gpt2"}, "is a gpt2 model and .* a llama")
    refused(whole, lambda config: {"model_type": "llava", "text_config": {"model_type": "gpt2"}}, "is a llava model")
    refused(lambda state: {n: t for n, t in state.items() if "layers.1." not in n}, dict, r"has no tensor .*layers\.1")
    refused(lambda state: {n: t[1:] if "up_proj" in n else t for n, t in state.items()}, dict, "up_proj.* in base")
