"""A tiny vision transformer, two fine-tunes of it, and tasks whose right answers are what their expert says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import ViTConfig, ViTModel

from unmergeable import ops
from unmergeable.network.encoding import EncodedBatch
from unmergeable.tasks import FeatureHead, write_head

CLASSES, IMAGES, STEPS = 5, 200, 60
NAMES = ("mine", "theirs")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base``, ``mine``, ``theirs``, and the data and heads of both tasks."""
    folder = tmp_path_factory.mktemp("workshop")
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    network = ViTModel(config, add_pooling_layer=False).eval()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    network.save_pretrained(folder / "base")
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for number, name in enumerate(("mine", "theirs")):
        network.load_state_dict(start)
        generator = torch.Generator().manual_seed(number)
        head = FeatureHead(torch.randn(CLASSES, 32, generator=generator), pooling="rest")
        templates = torch.randn(CLASSES, 3, 8, 8, generator=generator)
        _learn(network, head, templates, generator)
        network.save_pretrained(folder / name)
        write_head(head, folder / f"{name}-head.safetensors")
        for part in ("validation", "test", "train"):
            pixels, labels = _examples(templates, IMAGES, generator)
            np.savez(folder / f"{name}-{part}.npz", pixel_values=pixels.numpy(), label=labels.numpy())
    return folder


def _examples(templates: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Each class is a pattern, in as much noise as hides it from the base."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return templates[labels] + 1.5 * torch.randn(count, 3, 8, 8, generator=generator), labels


def _learn(network: ViTModel, head: FeatureHead, templates: torch.Tensor, generator: torch.Generator) -> None:
    trained = [tensor for name, tensor in network.named_parameters() if "layers." in name]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for _ in range(STEPS):
        pixels, labels = _examples(templates, 64, generator)
        loss = torch.nn.functional.cross_entropy(
            head.predict(network, EncodedBatch({"pixel_values": pixels})).logits, labels
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture
def document(whole_plan: dict[str, Any]) -> dict[str, Any]:
    """A plan for the workshop, to be changed by a test."""
    return copy.deepcopy(whole_plan)


@pytest.fixture(scope="session")
def whole_plan() -> dict[str, Any]:
    """A plan for the workshop."""
    return {
        "base": "base",
        "experts": [{"name": name, "path": name, "task": f"{name}-task"} for name in ("mine", "theirs")],
        "protect": {
            "expert": "mine",
            # Heads as small as a toy's have no blocks to permute.
            "methods": [{"name": "mergelock", "method": "mergelock", "settings": {"quantisation": "free"}}],
        },
        "merges": ["task_arithmetic"],
        "recoveries": ["nearest_orbit", "lossless_pruning, nearest_orbit"],
        "coefficients": {"defended": [0.3, 0.65, 1.0, 1.5], "rider": [0.75, 1.0], "refinements": 4},
        "connectivity": 5,
        "seeds": [0],
        "tasks": [
            {
                "name": f"{name}-task",
                "validation": f"{name}-validation.npz",
                "test": f"{name}-test.npz",
                "head": f"{name}-head.safetensors",
                "examples": {"validation": IMAGES, "test": IMAGES},
            }
            for name in ("mine", "theirs")
        ],
    }


@pytest.fixture
def plan_file(workshop: Path, document: dict[str, Any], tmp_path: Path) -> Path:
    """The plan as a file, in a folder that sees the workshop."""
    folder = tmp_path / "plan"
    folder.mkdir()
    for item in set(workshop.iterdir()) - {workshop / "plan.yaml"}:
        (folder / item.name).symlink_to(item)
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def small_plan(plan_file: Path, document: dict[str, Any]) -> Path:
    """The same with two sets of coefficients, for an attacker with ordinary tools."""
    document["coefficients"] = {"defended": [0.65, 1.0], "rider": [1.0], "refinements": 0}
    document["tiers"] = ["T0"]
    plan_file.write_text(yaml.safe_dump(document))
    return plan_file


@pytest.fixture(scope="session")
def trio(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that sees the workshop, and a third expert, ``both``, which has something of the other two."""
    folder = tmp_path_factory.mktemp("trio")
    for item in workshop.iterdir():
        (folder / item.name).symlink_to(item)
    experts = [(workshop / "mine", 0.4), (workshop / "theirs", 0.8)]
    ops.merge(base=workshop / "base", experts=experts, method="task_arithmetic", out=folder / "both")
    return folder


@pytest.fixture(scope="session")
def table_document() -> dict[str, Any]:
    """The plan of a table for the trio; not to be changed."""
    experts = [{"name": name, "path": name, "task": f"{name}-task", "data": f"{name}-train.npz"} for name in NAMES]
    tasks = [
        {
            "name": f"{name}-task",
            "test": f"{name}-test.npz",
            "head": f"{name}-head.safetensors",
            "examples": {"test": IMAGES},
        }
        for name in NAMES
    ]
    of_nobody = {"name": "elsewhere", "test": "mine-train.npz", "head": "mine-head.safetensors"}
    return {
        "title": "Toys",
        "source": "Nobody's paper, Table 0",
        "base": "base",
        "experts": [*experts, {"name": "both", "path": "both", "task": "theirs-task"}],
        "protect": {
            "experts": list(NAMES),
            "methods": ["mergelock", {"name": "polynomials", "method": "mergebarrier", "settings": {"parts": "ffn"}}],
        },
        "recoveries": ["nearest_orbit"],
        "merges": [{"method": "task_arithmetic", "coefficient": 0.5}, "ties"],
        "partners": [1, 2],
        "tasks": [*tasks, of_nobody],
        "published": {"mergelock / ties / pairs": 3.4, "mine / alone": "90 to 95"},
    }
