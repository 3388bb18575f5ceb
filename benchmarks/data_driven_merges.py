"""Merges that learn from data, beside two that do not: two vision experts, accuracy on both tasks.

    pip install --no-deps -r requirements-demo.txt
    python benchmarks/data_driven_merges.py SCRATCH [--steps 300] [--out FILE]
    python benchmarks/data_driven_merges.py --plot FILE

The models are those of ``unmergeable demo``: a DINOv2-small backbone, and two experts of it for handwritten digits and
animal silhouettes, each with a fixed head of class prototypes. They are trained into SCRATCH, or taken from there.
What each merge may see:

    task_arithmetic, ties    at the published setting: nothing; ``tuned``: 200 labelled validation images of each task
    fisher, regmean          256 of the training images of each expert, without labels
    adamerging               1 000 images of each task that no expert has seen, without labels

Accuracies are on 500 test images of each task that nothing else has seen (two standard errors: 4 points at most), so
that rows closer than that are alike. The authors of AdaMerging adapt on the test images themselves; here they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from unmergeable.demo.data import ANIMAL_SIZES, DIGIT_SIZES, Examples, ImageTask, load_animals, load_mnist
from unmergeable.demo.model import write_base_checkpoint
from unmergeable.demo.train import Expert, finetune_experts, fit_prototypes, prepare_pixels
from unmergeable.merges import AdaMerging, Fisher, Merge, RegMean, Ties, merge_state_dicts
from unmergeable.merges.adamerging import learn_coefficients
from unmergeable.merges.fisher import diagonal_fisher
from unmergeable.merges.regmean import gather_input_grams
from unmergeable.merges.task_vectors import TaskVectors, score_merges
from unmergeable.network.disk_weights import swapped
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.linear_layers import linear_layers
from unmergeable.network.load import load_network
from unmergeable.network.statistics import write_statistics
from unmergeable.network.tasks import Task, accuracy
from unmergeable.tasks import FeatureHead

SEED = 0
UNSEEN = 1000
STATISTICS = 256
BATCH = 16
SCALES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TIES_SCALES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)

State = Mapping[str, Tensor]
Scores = dict[str, float]


@dataclass(frozen=True)
class Material:
    """One task: its expert's weights, and its images in the roles of the module's table."""

    name: str
    expert: dict[str, Tensor]
    training: Task
    unseen: Task
    validation: Task
    test: Task


def prepare(scratch: Path) -> tuple[Any, dict[str, Tensor], list[Material]]:
    """The network, the base's weights, and both tasks; experts are trained unless they are there."""
    base = scratch / "base"
    if not base.exists():
        write_base_checkpoint(base)
    network = load_network(base)
    more = [replace(sizes, train=sizes.train + UNSEEN) for sizes in (DIGIT_SIZES, ANIMAL_SIZES)]
    wide = [load_mnist(seed=SEED, sizes=more[0]), load_animals(seed=SEED, sizes=more[1])]
    tasks = [replace(task, train=_part(task.train, 0, len(task.train) - UNSEEN)) for task in wide]
    heads = [fit_prototypes(network, task) for task in tasks]
    folders = [scratch / f"expert-{task.name}" for task in tasks]
    if not all(folder.exists() for folder in folders):
        experts = [Expert(task, head, folder) for task, head, folder in zip(tasks, heads, folders, strict=True)]
        finetune_experts(base, experts, seed=SEED)
    materials = [
        _material(task, head, folder, _part(extended.train, -UNSEEN, None))
        for task, head, folder, extended in zip(tasks, heads, folders, wide, strict=True)
    ]
    return network, load_file(base / "model.safetensors"), materials


def _part(examples: Examples, start: int, stop: int | None) -> Examples:
    return Examples(examples.images[start:stop], examples.labels[start:stop])


def _material(task: ImageTask, head: FeatureHead, folder: Path, unseen: Examples) -> Material:
    def task_of(examples: Examples, batch_size: int) -> Task:
        batches = []
        for start in range(0, len(examples), batch_size):
            some = _part(examples, start, start + batch_size)
            batches.append(EncodedBatch({"pixel_values": prepare_pixels(some.images)}, torch.from_numpy(some.labels)))
        return Task(task.name, batches, head.predict)

    return Material(
        name=task.name,
        expert=load_file(folder / "model.safetensors"),
        training=task_of(_part(task.train, 0, STATISTICS), BATCH),
        unseen=task_of(unseen, BATCH),
        validation=task_of(task.validation, 50),
        test=task_of(task.test, 50),
    )


class Bench:
    """The models in memory, and what is asked of every merge of them."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.network, self.base, self.materials = prepare(scratch)
        self.experts = [material.expert for material in self.materials]
        self.task_vectors = TaskVectors.between(self.base, self.experts)
        self.rows: list[dict[str, Any]] = []

    def scores(self, network: Any, part: str) -> Scores:
        """Accuracy on each task."""
        return {material.name: accuracy(network, getattr(material, part)) for material in self.materials}

    def add(self, name: str, state: State, seconds: float = 0.0, **facts: Any) -> None:
        """A row of the table: ``seconds`` of processor time it took to learn what to merge."""
        with swapped(self.network, state):
            scores = self.scores(self.network, "test")
        row = {"model": name, **facts, "accuracy": scores, "average": round(fmean(scores.values()), 4)}
        self.rows.append({**row, "cpu_seconds": round(seconds, 1)})
        print(json.dumps(self.rows[-1]), flush=True)

    def merge(self, method: Merge, coefficients: Sequence[float] | None = None) -> State:
        return merge_state_dicts(self.base, self.experts, method=method, coefficients=coefficients)

    def tuned(self, candidates: Mapping[float, Callable[[], State]]) -> tuple[float, State]:
        """The scale with the best average on the validation images, and its merge."""
        found = {}
        for scale, merge in candidates.items():
            with swapped(self.network, merge()):
                found[scale] = fmean(self.scores(self.network, "validation").values())
        best = max(found, key=lambda scale: found[scale])
        return best, candidates[best]()


def run_plain(bench: Bench) -> None:
    """The models themselves, and the merges without data."""
    bench.add("base", bench.base)
    for material in bench.materials:
        bench.add(f"expert: {material.name}", material.expert)
    bench.add("linear", bench.task_vectors.merged((0.5, 0.5)))
    bench.add("task_arithmetic", bench.task_vectors.merged((0.3, 0.3)), scaling_coefficient=0.3)
    began = time.process_time()
    found = score_merges(
        bench.network,
        bench.task_vectors,
        [(scale, scale) for scale in SCALES],
        lambda network: fmean(bench.scores(network, "validation").values()),
    )
    best = SCALES[max(range(len(SCALES)), key=lambda number: found[number])]
    spent = time.process_time() - began
    bench.add("task_arithmetic, tuned", bench.task_vectors.merged((best, best)), spent, scaling_coefficient=best)
    bench.add("ties", bench.merge(Ties()), scaling_coefficient=1.0)
    began = time.process_time()
    candidates = {scale: lambda scale=scale: bench.merge(Ties(scaling_coefficient=scale)) for scale in TIES_SCALES}
    scale, state = bench.tuned(candidates)
    bench.add("ties, tuned", state, time.process_time() - began, scaling_coefficient=scale)


def run_statistics(bench: Bench) -> None:
    """Fisher merging and RegMean."""
    for write, methods in (
        (_write_fisher, {"fisher": Fisher(), "fisher, floor 1e-12": Fisher(floor=1e-12)}),
        (_write_grams, {"regmean": RegMean(), "regmean, alpha 1": RegMean(alpha=1.0)}),
    ):
        with TemporaryDirectory(dir=bench.scratch) as place:
            began = time.process_time()
            for number, material in enumerate(bench.materials, start=1):
                with swapped(bench.network, material.expert):
                    write(bench, material, Path(place) / str(number))
            spent = time.process_time() - began
            for name, method in methods.items():
                bench.add(name, bench.merge(replace(method, statistics=place)), spent)


def _write_fisher(bench: Bench, material: Material, folder: Path) -> None:
    found = diagonal_fisher(bench.network, material.training, seed=SEED)
    names = sorted(bench.base)
    shapes = {name: tuple(found[name].shape) for name in names}
    write_statistics(folder, shapes, ((name, found[name]) for name in names), facts={"data": material.name})


def _write_grams(bench: Bench, material: Material, folder: Path) -> None:
    shapes = {layer.key: (layer.inputs, layer.inputs) for layer in linear_layers(bench.network)}
    write_statistics(
        folder, shapes, gather_input_grams(bench.network, material.training), facts={"data": material.name}
    )


def run_adamerging(bench: Bench, steps: int, every: int) -> dict[str, Any]:
    """Three forms of AdaMerging, and how each got there."""
    curves: dict[str, Any] = {}
    for name, method in {
        "adamerging, task-wise": AdaMerging(granularity="task", steps=steps),
        "adamerging, layer-wise": AdaMerging(steps=steps),
        "adamerging++, layer-wise": AdaMerging(task_vectors="ties", steps=steps),
    }.items():
        accuracies: list[dict[str, Any]] = []
        watching = 0.0

        def watch(step: int, network: Any, accuracies: list[dict[str, Any]] = accuracies) -> None:
            nonlocal watching
            if step % every == 0:
                began = time.process_time()
                accuracies.append({"step": step, **bench.scores(network, "validation")})
                watching += time.process_time() - began

        began = time.process_time()
        learnt = learn_coefficients(
            bench.network, bench.task_vectors, [m.unseen for m in bench.materials], method, observe=watch
        )
        spent = time.process_time() - began - watching
        vectors = bench.task_vectors if method.task_vectors == "plain" else bench.task_vectors.elected(method.density)
        state = vectors.merged(lambda name, learnt=learnt: learnt.coefficients[name])
        means = [round(fmean(values), 3) for values in zip(*learnt.coefficients.values(), strict=True)]
        bench.add(name, state, spent, mean_coefficients=means)
        with swapped(bench.network, state):
            accuracies.append({"step": steps, **bench.scores(bench.network, "validation")})
        entropies = {m.name: [round(e[i], 4) for e in learnt.entropies] for i, m in enumerate(bench.materials)}
        curves[name] = {"entropy": entropies, "validation_accuracy": accuracies}
    return curves


def plot(results: Path) -> None:
    """Draw the AdaMerging curves beside the JSON file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "data_driven_merges"
    import matplotlib.pyplot as plt

    curves = json.loads(results.read_text())["adamerging"]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.0))
    window = UNSEEN // BATCH  # one pass over the images: a shorter one would show which of them are hard
    for colour, (name, curve) in zip(("#1f77b4", "#d62728", "#2ca02c"), curves.items(), strict=True):
        for style, (task, entropies) in zip(("-", "--"), curve["entropy"].items(), strict=True):
            steps = range(window, len(entropies) + 1)
            smooth = [fmean(entropies[step - window : step]) for step in steps]
            axes[0].plot(steps, smooth, style, color=colour, label=f"{name}: {task}")
            points = curve["validation_accuracy"]
            axes[1].plot([p["step"] for p in points], [100 * p[task] for p in points], style, color=colour, marker=".")
    axes[0].set_title(f"entropy, nats, over the last {window} steps")
    axes[1].set_title("accuracy on 200 validation images, %")
    for axis in axes:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="lower center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(results.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, nargs="?", help="a folder for the models; created if missing")
    parser.add_argument("--steps", type=int, default=300, help="of AdaMerging; its authors take 500")
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements of accuracy")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where to write the results, and a plot beside them")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="draw the results in this file, measure nothing")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.plot)
        return
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    bench = Bench(arguments.scratch)
    run_plain(bench)
    run_statistics(bench)
    curves = run_adamerging(bench, arguments.steps, arguments.every)
    document = {
        "seed": SEED,
        "steps": arguments.steps,
        "test_images_per_task": 500,
        "rows": bench.rows,
        "adamerging": curves,
        "machine": {"processors": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__},
    }
    text = json.dumps(document, indent=1) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
        plot(arguments.out)
    else:
        print(text)


if __name__ == "__main__":
    main()
