"""The demo's two experts (digits, animals) with their data, heads and an audit's plan: what benchmarks measure on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from unmergeable.demo.data import ImageTask, load_animals, load_mnist
from unmergeable.demo.model import write_base_checkpoint
from unmergeable.demo.train import Expert, finetune_experts, fit_prototypes, prepare_pixels
from unmergeable.network.load import load_network
from unmergeable.tasks import write_head

PLAN = {
    "base": "base",
    "experts": [{"name": name, "path": name, "task": name} for name in ("digits", "animals")],
    "protect": {"expert": "digits", "methods": ["mergelock"]},
    "merges": ["task_arithmetic", "ties"],
    "tasks": [
        {
            "name": name,
            "validation": f"{name}-validation.npz",
            "test": f"{name}-test.npz",
            "head": f"{name}-head.safetensors",
        }
        for name in ("digits", "animals")
    ],
}


def prepare(scratch: Path) -> Path:
    """Train and write them unless they are there; returns the plan."""
    scratch.mkdir(parents=True, exist_ok=True)
    plan = scratch / "plan.yaml"
    if plan.exists():
        return plan
    base = scratch / "base"
    write_base_checkpoint(base)
    tasks = (load_mnist(), load_animals())
    heads = {task.name: fit_prototypes(load_network(base), task) for task in tasks}
    finetune_experts(base, [Expert(task, heads[task.name], scratch / task.name) for task in tasks])
    for task in tasks:
        write_head(heads[task.name], scratch / f"{task.name}-head.safetensors")
        write_data(task, scratch)
    plan.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    return plan


def write_data(task: ImageTask, folder: Path) -> None:
    """Pixels as the network takes them, so that nothing else has to be known about the images."""
    for part in ("validation", "test"):
        examples = getattr(task, part)
        pixels = prepare_pixels(examples.images).numpy()
        np.savez(folder / f"{task.name}-{part}.npz", pixel_values=pixels, label=examples.labels)
