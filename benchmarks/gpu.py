"""What a GPU changes: merges in memory, a training protection and an audit, there and on the processor, in one run.

    python benchmarks/gpu.py SCRATCH [--size whole|small] [--out benchmarks/results/gpu.json]

Builds random models in SCRATCH; nothing is downloaded. Each job runs once on each device, in a process of its own: for
the processor no GPU is visible. ``whole`` is sized to less than eight minutes of one accelerator beside sixteen
processors.

    merges     every merge that needs no data, of three state dicts on the device; seconds of each method
    training   ``protect --method collapse``; seconds, and accuracies on its own data
    audit      a plan with one protection, one merge and one recovery; seconds, D*, and the best score of each recovery

Prints one JSON object: seconds, their ratios (processor over GPU), and how far the results lie apart. Nothing is
compared, and every ratio is null, where torch sees no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

import unmergeable
from unmergeable import evaluation
from unmergeable.devices import VISIBLE, network_device
from unmergeable.errors import UnmergeableError
from unmergeable.merges import MERGES, merge_method, merge_state_dicts
from unmergeable.merges.spectral import SpectralMerge
from unmergeable.tasks import FeatureHead, write_head

DEVICES = ("processor", "gpu")
SAMPLE = 4096
"""Numbers of each merged tensor that are compared."""


@dataclass(frozen=True)
class Size:
    """Of the vision transformer, its examples and its training, and of the state dicts that are merged."""

    hidden: int
    layers: int
    examples: int
    steps: int
    matrices: int
    width: int
    coefficients: int
    """From 1 downwards in steps of 0.2, at most 5."""


SIZES = {
    "whole": Size(hidden=384, layers=12, examples=200, steps=60, matrices=12, width=4096, coefficients=5),
    "small": Size(hidden=16, layers=2, examples=8, steps=2, matrices=2, width=64, coefficients=1),
}
CLASSES = 10
TASKS = ("mine", "theirs")


def build(folder: Path, size: Size) -> None:
    """A base, two models near it, and a task for each, whose answers the models themselves give."""
    from transformers import ViTConfig, ViTModel

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=max(2, size.hidden // 64),
        image_size=64,
        patch_size=8,
    )
    network = ViTModel(config, add_pooling_layer=False).eval()
    network.save_pretrained(folder / "base")
    own = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    tasks: list[dict[str, Any]] = []
    for name in TASKS:
        for parameter_name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = own[parameter_name] + own[parameter_name].std().nan_to_num() * noise
        network.save_pretrained(folder / name)
        head = FeatureHead(torch.randn(CLASSES, size.hidden, generator=generator), pooling="rest")
        write_head(head, folder / f"{name}-head.safetensors")
        files = {part: f"{name}-{part}.npz" for part in ("train", "validation", "test")}
        for file in files.values():
            pixels = torch.randn(size.examples, 3, 64, 64, generator=generator)
            with torch.no_grad():
                features = network(pixels).last_hidden_state[:, 1:].mean(1)
            label = (features @ head.weight.T).argmax(-1)
            np.savez(folder / file, pixel_values=pixels.numpy(), label=label.numpy())
        examples = {"validation": size.examples, "test": size.examples}
        tasks.append({"name": name, **files, "head": f"{name}-head.safetensors", "examples": examples})
    grid = [round(1 - 0.2 * number, 1) for number in range(size.coefficients)]
    plan = {
        "base": "base",
        "experts": [{"name": name, "path": name, "task": name} for name in TASKS],
        "protect": {"expert": "mine", "methods": ["mergelock"]},
        "merges": ["task_arithmetic"],
        "recoveries": ["nearest_orbit"],
        "coefficients": {"defended": grid, "rider": grid, "refinements": 0},
        "tiers": ["T0", "T1"],
        "tasks": tasks,
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))


# --- the jobs; each returns what it found, with the seconds it took under "seconds"


def merges(folder: Path, out: Path, size: Size) -> dict[str, Any]:
    """Every merge without data; a sample of every result is left in ``out``."""
    device = network_device()
    widths = {size.width, size.width // 4}
    models = {width: [matrices(size, width, seed, device) for seed in range(3)] for width in widths}
    seconds, refused, samples = {}, {}, {}
    for name in MERGES:
        method = merge_method(name)
        if method.needs_data:
            continue
        # Decompositions go with the third power of the width.
        base, *experts = models[size.width // 4 if isinstance(method, SpectralMerge) else size.width]
        try:
            began = now()
            merged = merge_state_dicts(
                base if method.needs_base else None, experts[: method.most_experts], method=method
            )
            seconds[name] = now() - began
        except UnmergeableError as error:
            refused[name] = str(error)
            continue
        samples.update({f"{name}.{tensor}": value.flatten()[:SAMPLE].float().cpu() for tensor, value in merged.items()})
    np.savez(out / "merges.npz", **{name: sample.numpy() for name, sample in samples.items()})
    return {"seconds": seconds, "refused": refused}


def matrices(size: Size, width: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    """A base (seed 0), or what lies near it: square matrices."""
    found = {}
    for number in range(size.matrices):
        own = torch.randn(width, width, generator=torch.Generator().manual_seed(number))
        update = torch.randn(width, width, generator=torch.Generator().manual_seed(1000 * seed + number))
        found[f"layers.{number}.weight"] = (own + (0.05 * update if seed else 0)).bfloat16().to(device)
    return found


def training(folder: Path, out: Path, size: Size) -> dict[str, Any]:
    """A training protection, in float32 on both devices."""
    began = now()
    result = unmergeable.protect(
        folder / "mine",
        base=folder / "base",
        out=out / "release",
        method="collapse",
        data=folder / "mine-train.npz",
        head=folder / "mine-head.safetensors",
        seed=0,
        settings={"steps": size.steps},
    )
    return {"seconds": {"collapse": now() - began}, "accuracies": result.to_json()["accuracies"]}


def audit(folder: Path, out: Path, size: Size) -> dict[str, Any]:
    """An audit: one worker for a GPU, one for each processor otherwise."""
    began = now()
    result = evaluation.audit(folder / "plan.yaml", out=out / "audit")
    seconds = {"audit": now() - began}
    found = {
        f"{name}, {tier}": None if verdicts.worst is None else verdicts.worst.d_star
        for name, protection in result.protections.items()
        for tier, verdicts in protection.tiers.items()
    }
    scores = {
        f"{name}, {cell.recovery}": cell.score
        for name, protection in result.protections.items()
        for cell in protection.matrix
    }
    return {"seconds": seconds, "d_star": found, "scores": scores}


JOBS: dict[str, Callable[[Path, Path, Size], dict[str, Any]]] = {"merges": merges, "training": training, "audit": audit}


def now() -> float:
    """Seconds on the clock, once the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# --- both devices, and what differs


def run(job: str, device: str, folder: Path, size: str) -> dict[str, Any]:
    """One job on one device, in a process of its own that finds no GPU where it should not use one."""
    out = folder / f"out-{device}"
    out.mkdir(exist_ok=True)
    environment = {**os.environ} if device == "gpu" else {**os.environ, VISIBLE: ""}
    command = [sys.executable, __file__, str(folder), "--size", size, "--job", job, "--device", device]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{job} failed on the {device}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(found: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Ratios of seconds, and the largest differences of results."""
    ours, theirs = (found[device] for device in DEVICES)
    ratios = {
        job: {name: seconds / theirs[job]["seconds"][name] for name, seconds in ours[job]["seconds"].items()}
        for job in ours
    }
    with np.load(folder / "out-processor" / "merges.npz") as here, np.load(folder / "out-gpu" / "merges.npz") as there:
        apart = {name: float(np.abs(here[name] - there[name]).max() / np.abs(here[name]).max()) for name in here}
    merged: dict[str, float] = {}
    for name, difference in apart.items():
        method = name.partition(".")[0]
        merged[method] = max(merged.get(method, 0.0), difference)
    return {
        "processor_over_gpu": ratios,
        "largest_relative_difference_of_merges": merged,
        "largest_difference_of_accuracies": largest(ours["training"]["accuracies"], theirs["training"]["accuracies"]),
        "largest_difference_of_scores": largest(ours["audit"]["scores"], theirs["audit"]["scores"]),
    }


def largest(ours: dict[str, float | None], theirs: dict[str, float | None]) -> float:
    """The largest difference of what has a value on both sides; infinite where only one has it."""
    differences = [0.0]
    for name in ours.keys() | theirs.keys():
        first, second = ours.get(name), theirs.get(name)
        if first is not None and second is not None:
            differences.append(abs(first - second))
        elif first is not second:
            differences.append(math.inf)
    return max(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--size", choices=SIZES, default="whole")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=DEVICES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder, size = options.scratch.resolve(), SIZES[options.size]
    if options.job:
        print(json.dumps(JOBS[options.job](folder, folder / f"out-{options.device}", size)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*TASKS, "base", *(f"out-{device}" for device in DEVICES)):
        shutil.rmtree(folder / name, ignore_errors=True)
    build(folder, size)
    devices = DEVICES if torch.cuda.is_available() else DEVICES[:1]
    found = {device: {job: run(job, device, folder, options.size) for job in JOBS} for device in devices}
    report = {
        "command": "python benchmarks/gpu.py SCRATCH",
        "size": options.size,
        "machine": {
            "processors": os.cpu_count(),
            "machine": platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
        },
        "found": found,
        "compared": compared(found, folder) if len(devices) == 2 else None,
    }
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
