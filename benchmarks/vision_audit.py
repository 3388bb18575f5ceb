"""What the exact protections are worth on a real vision model: an audit of the demo's digits expert.

    pip install --no-deps -r requirements-demo.txt
    python benchmarks/vision_audit.py SCRATCH [--workers N] [--out benchmarks/results/vision_audit.json]

Trains the demo's two experts into SCRATCH unless they are there, writes their data, heads and plan beside them, and
runs ``unmergeable audit`` on the plan. Started again with the same SCRATCH it goes on where it was. Writes the result
without its cells as JSON, and the block for a model card beside it as Markdown. The page is
``SCRATCH/audit/report.html``.

There are 500 test images for each task: an accuracy is known to about 4 points, a D* to the interval given.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from unmergeable.auditing.report import write_report
from unmergeable.auditing.run import audit
from unmergeable.auditing.verdict import model_card, summary
from unmergeable.demo.data import ImageTask, load_animals, load_mnist
from unmergeable.demo.model import write_base_checkpoint
from unmergeable.demo.train import Expert, finetune_experts, fit_prototypes, prepare_pixels
from unmergeable.network.load import load_network
from unmergeable.progress import Progress, silent
from unmergeable.tasks import write_head

PLAN = {
    "base": "base",
    "experts": [{"name": name, "path": name, "task": name} for name in ("digits", "animals")],
    "protect": {
        "expert": "digits",
        "methods": [
            "mergelock",
            {"name": "mergelock, condition 1000", "method": "mergelock", "settings": {"condition": 1000}},
            "params",
            "gauge",
        ],
    },
    "merges": ["task_arithmetic", "ties"],
    "recoveries": ["kabsch", "nearest_orbit"],
    "coefficients": {"defended": [0.3, 0.6, 1.0], "rider": [0.5, 0.8, 1.1], "refinements": 6},
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
    """Experts, data, heads and plan; returns the plan."""
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


def told(began: float) -> Progress:
    """Prints the end of every stage."""

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        if done == total and stage not in ("writing", "verifying", "estimating"):
            print(f"{time.monotonic() - began:7.1f} s  {stage}: {total} {unit}", flush=True)

    return progress


def write_results(document: Mapping[str, Any], out: Path) -> None:
    """What is small enough to keep beside the code: the result without its cells, and the block for a model card."""
    kept = {name: value for name, value in document.items() if name != "cells"}
    out.write_text(json.dumps({**kept, "scored": len(document["cells"])}, indent=1) + "\n")
    out.with_suffix(".md").write_text(model_card(document))


def main() -> None:
    """Prepare, audit, keep what is small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    plan = prepare(arguments.scratch)
    folder = arguments.scratch / "audit"
    began = time.monotonic()
    progress = silent if arguments.quiet else told(began)
    document = audit(plan, out=folder, workers=arguments.workers, progress=progress)
    print(*summary(document), write_report(folder), sep="\n")
    if arguments.out is not None:
        write_results(document, arguments.out)


if __name__ == "__main__":
    main()
