"""Which layers a network can least do without: the race of ``mergeguard`` against zeroing each layer and scoring all.

    pip install --no-deps -r requirements-demo.txt
    python benchmarks/layer_criticality.py SCRATCH [--out benchmarks/results/layer_criticality.json]

Started again with the same --out it leaves out what is there; modules take minutes of CPU, blocks half a one.

On the demo's digits expert (DINOv2-small, 12 blocks) and its 500 test images; the expert is trained into SCRATCH unless
it is there. Layers are modules (120 of them, 12 to be excluded) or whole blocks (12, of which 2). Measured: whether the
same layers are excluded, and CPU seconds, those of the plain way being the sum over layers of one pass of all images.
The race runs once for every order of the images. A first-order estimate, |<theta_l, d loss / d theta_l>| from a
single backward pass, is compared as well.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from demo_experts import prepare
from torch import Tensor
from torch.nn import functional

from unmergeable.data import DataSource
from unmergeable.network.disk_weights import disk_gradients, find_places, show
from unmergeable.network.fine_tune import gather_examples, judge
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task
from unmergeable.ops.opened import open_with_architecture
from unmergeable.protections import MergeGuard
from unmergeable.protections.mergeguard.criticality import CONFIDENCE, find_critical_layers
from unmergeable.tasks import LabelledData

BATCH = 16
ORDERS = 3


@dataclass(frozen=True)
class Plain:
    """Layers most critical first, their drops of accuracy, and the CPU seconds that took."""

    order: Sequence[str]
    drops: Mapping[str, float]
    seconds: float


def zero_each(network: Any, task: Task, layers: Mapping[str, Sequence[str]], weights: Mapping[str, Tensor]) -> Plain:
    """Zero each layer in turn and score all examples."""
    places = find_places(network)
    examples = gather_examples(task, sum(map(len, task.batches)))
    intact = judge(network, task.predict, examples, batch_size=BATCH)
    found, seconds = {}, 0.0
    for layer, names in layers.items():
        show(places, {name: torch.zeros_like(weights[name]) for name in names})
        began = time.process_time()
        found[layer] = judge(network, task.predict, examples, batch_size=BATCH)
        seconds += time.process_time() - began
        show(places, {name: weights[name] for name in names})
    order = sorted(layers, key=lambda layer: (found[layer].right, -found[layer].loss))  # stable: equals in file order
    return Plain(order, {layer: intact.accuracy - judged.accuracy for layer, judged in found.items()}, seconds)


def first_order(network: Any, task: Task, layers: Mapping[str, Sequence[str]], weights: Mapping[str, Tensor]) -> Plain:
    """Rank by how much a step to zero would change the loss if the loss were linear."""
    places = find_places(network)
    began = time.process_time()
    network.zero_grad(set_to_none=True)
    for batch in task.batches:
        prediction = task.predict(network, batch)
        functional.cross_entropy(prediction.logits, prediction.require_targets(), reduction="sum").backward()
    gradients = disk_gradients(places)
    changes = {
        layer: abs(sum(float((weights[name] * gradients[name]).sum()) for name in names))
        for layer, names in layers.items()
    }
    network.zero_grad(set_to_none=True)
    seconds = time.process_time() - began
    return Plain(sorted(layers, key=lambda layer: -changes[layer]), changes, seconds)


def compare(network: Any, folder: Path, data: DataSource, head: Path, method: MergeGuard) -> dict[str, Any]:
    """One granularity."""
    source, architecture = open_with_architecture(folder)
    layers = method.layers(architecture, source.names)
    weights = {name: source.tensor(name) for names in layers.values() for name in names}
    count = method.excluded_count(layers)

    def task(seed: int) -> Task:
        ordered = DataSource(data.path, seed=seed)
        return LabelledData(ordered, folder, head).task(network, "digits", batch_size=BATCH)

    plain = zero_each(network, task(0), layers, weights)
    estimate = first_order(network, task(0), layers, weights)
    races = []
    for seed in range(ORDERS):
        ordered = task(seed)
        began = time.process_time()
        found = find_critical_layers(network, ordered, layers, count)
        seconds = time.process_time() - began
        races.append(
            {
                "order": seed,
                "same_layers": set(found.critical) == set(plain.order[:count]),
                "in_common": len(set(found.critical) & set(plain.order[:count])),
                "cpu_seconds": round(seconds, 2),
                "cost_ratio": round(seconds / plain.seconds, 4),
                "evaluations_ratio": round(found.evaluations / (found.examples * len(layers)), 4),
            }
        )
    return {
        "layers": len(layers),
        "excluded": count,
        "plain_cpu_seconds": round(plain.seconds, 2),
        "median_cost_ratio": median(race["cost_ratio"] for race in races),
        "races": races,
        "first_order": {
            "in_common": len(set(estimate.order[:count]) & set(plain.order[:count])),
            "cost_ratio": round(estimate.seconds / plain.seconds, 4),
        },
        "most_critical": {layer: round(plain.drops[layer], 4) for layer in plain.order[: 2 * count]},
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prepare(arguments.scratch)
    folder = arguments.scratch / "digits"
    data = DataSource(arguments.scratch / "digits-test.npz")
    head = arguments.scratch / "digits-head.safetensors"
    network = load_network(folder)
    document: dict[str, Any] = {
        "model": "demo digits expert (DINOv2-small)",
        "images": sum(1 for _ in data),
        "confidence": CONFIDENCE,
    }
    if arguments.out is not None and arguments.out.exists():
        document |= json.loads(arguments.out.read_text())
    for granularity in ("block", "module"):
        if granularity in document:
            continue
        method = MergeGuard(granularity=granularity)
        document[granularity] = compare(network, folder, data, head, method)
        print(json.dumps({granularity: document[granularity]}, indent=1), flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
