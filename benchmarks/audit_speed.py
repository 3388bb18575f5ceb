"""How many cells a minute an audit scores, against the obvious loop, in one run on a real vision model.

    pip install --no-deps -r requirements-demo.txt
    python benchmarks/audit_speed.py SCRATCH [--rounds 3] [--cells 24] [--examples 200]
        [--out benchmarks/results/audit_speed.json]

Prepares the demo's experts in SCRATCH unless they are there. A cell is one set of merged
weights, scored on the validation examples of both tasks. Each round goes one after another through

    commands   for every cell ``unmergeable merge`` on disk, then a script that loads the result and scores it
    loop       the same within one process: merge on disk, load, read and encode the data, score
    one, two   the group that an audit runs, with one worker and with two
    bare       two processes that do nothing but the forward passes, over what one of them does alone

with the same coefficients: ``commands`` and ``loop`` do the first few of them, on all processors; a worker of an audit
has one. Workers are warm, as they are but for the first cell of an audit; what starting them takes is told apart
(``start_up``). Prints one JSON object: cells a minute of each round, the medians over rounds of the ratios of what was
measured in the same round, and how a cell of the loop divides into its parts. Whatever is done about the other parts,
examples have to be scored: no way of giving the same credits on the same processors is faster than the loop by more
than ``ceiling``, its seconds over those of scoring; and no two workers are faster than one by more than ``bare``. All
ways must give the same credits, example by example and bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from demo_experts import prepare

from unmergeable import ops
from unmergeable.data import DataSource
from unmergeable.evaluation.plans.audit_plan import AuditPlan, read_plan
from unmergeable.evaluation.plans.entries import MergeEntry
from unmergeable.evaluation.scoring import Checkpoint, Group, ScoredTask, network_of, score_points, scorers_of
from unmergeable.network.load import load_network
from unmergeable.pools.pool import Call, WorkerPool
from unmergeable.tasks import LabelledData, example_credits

Point = tuple[float, float]
Credits = dict[str, np.ndarray]

CHUNK = 4
"""Points that a worker is given at a time, as the search of an audit does."""


def points(cells: int) -> list[Point]:
    """Coefficients of the defended expert and the free-rider's, spread over what an audit looks at."""
    side = range(1, 1 + int(np.ceil(cells**0.5)))
    return [(0.2 * x, 0.25 * y) for x, y in product(side, side)][:cells]


def merge_on_disk(plan: AuditPlan, method: str, point: Point, out: Path) -> None:
    """What a loop does first."""
    experts = [(plan.victim.path, point[0]), (plan.riders[0].path, point[1])]
    ops.merge(base=plan.base, experts=experts, method=method, out=out)


def load_and_score(plan: AuditPlan, folder: Path, spent: dict[str, float]) -> Credits:
    """What it does next; ``spent`` is told the seconds of each part."""
    began = time.perf_counter()
    network = load_network(folder)
    loaded = time.perf_counter()
    tasks = []
    for name in (plan.victim.task, plan.riders[0].task):
        entry = plan.task(name)
        source = DataSource(entry.validation, seed=0, limit=entry.sizes[0])
        labelled = LabelledData(source, entry.encoder, entry.head)
        tasks.append(labelled.task(network, entry.name, batch_size=entry.batch_size))
    read = time.perf_counter()
    credits_by_task = {task.name: example_credits(network, task) for task in tasks}
    for part, seconds in (("load", loaded - began), ("data", read - loaded), ("score", time.perf_counter() - read)):
        spent[part] = spent.get(part, 0.0) + seconds
    return credits_by_task


def by_commands(plan_file: Path, method: str, chosen: Sequence[Point], work: Path) -> tuple[list[Credits], float]:
    """Two processes for every cell. Returns credits and seconds."""
    plan, found, began = read_plan(plan_file), [], time.perf_counter()
    for point in chosen:
        merged = work / "merged"
        experts = [
            text
            for path, value in zip((plan.victim.path, plan.riders[0].path), point, strict=True)
            for text in ("--expert", f"{path}={value!r}")
        ]
        merge = ["merge", "--base", str(plan.base), *experts, "--method", method, "--out", str(merged), "--quiet"]
        subprocess.run([sys.executable, "-m", "unmergeable", *merge], check=True, stdout=subprocess.DEVNULL)
        score = [sys.executable, __file__, str(plan_file), "--score", str(merged)]
        answer = json.loads(subprocess.run(score, check=True, capture_output=True, text=True).stdout)
        found.append({task: np.array(values) for task, values in answer.items()})
        shutil.rmtree(merged)
    return found, time.perf_counter() - began


def by_bare_passes(pool: WorkerPool, plan_file: Path, passes: int, copies: int) -> float:
    """Cells a minute of ``copies`` processes that score one network again and again."""
    began = time.perf_counter()
    list(pool.run([(score_again, (plan_file, passes))] * copies))
    return 60 * passes * copies / (time.perf_counter() - began)


def score_again(plan_file: Path, passes: int) -> None:
    """What is left of a cell when nothing is merged: the forward passes of the base, in a worker of its own."""
    plan = read_plan(plan_file)
    group = group_of(plan, "task_arithmetic")
    scorers = scorers_of(group, "validation")
    network = network_of(plan.base)
    for _ in range(passes):
        for scorer in scorers.values():
            scorer.credits(network)


def by_loop(
    plan_file: Path, method: str, chosen: Sequence[Point], work: Path, spent: dict[str, float]
) -> tuple[list[Credits], float]:
    """Everything in this process, on all processors. Returns credits and seconds."""
    torch.set_num_threads(os.cpu_count() or 1)
    plan, found, began = read_plan(plan_file), [], time.perf_counter()
    for point in chosen:
        before = time.perf_counter()
        merge_on_disk(plan, method, point, work / "merged")
        spent["merge"] = spent.get("merge", 0.0) + time.perf_counter() - before
        found.append(load_and_score(plan, work / "merged", spent))
        shutil.rmtree(work / "merged")
    torch.set_num_threads(1)  # as the audit does in this process, where there is one worker
    return found, time.perf_counter() - began


def by_audit(
    plan_file: Path, method: str, chosen: Sequence[Point], work: Path, pool: WorkerPool
) -> tuple[list[Credits], float]:
    """The group of an audit, in chunks as its search asks for them. Returns credits and seconds."""
    plan, cells = read_plan(plan_file), work / "cells"
    shutil.rmtree(cells, ignore_errors=True)
    cells.mkdir()
    group = group_of(plan, method)
    chunks = [chosen[start : start + CHUNK] for start in range(0, len(chosen), CHUNK)]
    calls: list[Call] = [(score_points, (group, chunk, "validation", cells)) for chunk in chunks]
    began = time.perf_counter()
    done = dict(pool.run(calls))
    seconds = time.perf_counter() - began
    scored = {point: cell for outcome in done.values() for point, cell in outcome.cells.items()}
    return [dict(scored[point].credits) for point in chosen], seconds


def group_of(plan: AuditPlan, method: str) -> Group:
    """What an audit calls the merges of the two experts; there is only one set of files, so digests may be names."""
    tasks = [ScoredTask(plan.task(name), {"validation": name}) for name in (plan.victim.task, plan.riders[0].task)]
    models = [Checkpoint(path, path.name) for path in (plan.base, plan.victim.path, plan.riders[0].path)]
    return Group(models[0], (models[1], models[2]), MergeEntry(method, method, {}), tuple(tasks))


def measure(plan_file: Path, method: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All ways, round after round."""
    chosen, few = points(arguments.cells), points(arguments.cells)[: arguments.loop_cells]
    spent: dict[str, float] = {}
    rounds = []
    with WorkerPool(1) as one, WorkerPool(2) as two:
        started = {}
        for name, pool in (("one", one), ("two", two)):
            began = time.perf_counter()
            by_audit(plan_file, method, points(2 * CHUNK), work, pool)
            started[name] = time.perf_counter() - began
        ways: dict[str, tuple[Sequence[Point], Callable[[Sequence[Point]], tuple[list[Credits], float]]]] = {
            "commands": (few, lambda its: by_commands(plan_file, method, its, work)),
            "loop": (few, lambda its: by_loop(plan_file, method, its, work, spent)),
            "one": (chosen, lambda its: by_audit(plan_file, method, its, work, one)),
            "two": (chosen, lambda its: by_audit(plan_file, method, its, work, two)),
        }
        for _ in range(arguments.rounds):
            speeds, credits_of = {}, {}
            for name, (its, run) in ways.items():
                credits_of[name], seconds = run(its)
                speeds[name] = 60 * len(its) / seconds
                print(f"{method}, {name}: {speeds[name]:.1f} cells a minute", file=sys.stderr, flush=True)
            require_equal(credits_of)
            passes = max(1, arguments.cells // 4)
            bare = {copies: by_bare_passes(two, plan_file, passes, copies) for copies in (2, 1)}
            rounds.append({**speeds, "bare": bare[2] / bare[1]})
    ratios = {
        f"{fast} / {slow}": median(speeds[fast] / speeds[slow] for speeds in rounds)
        for fast, slow in (("two", "commands"), ("one", "commands"), ("two", "loop"), ("one", "loop"), ("two", "one"))
    }
    ratios["two bare / one bare"] = median(speeds["bare"] for speeds in rounds)
    looped = arguments.rounds * len(few)
    return {
        "method": method,
        "cells_a_minute": rounds,
        "median_ratios": ratios,
        "loop_seconds_per_cell": {part: seconds / looped for part, seconds in spent.items()},
        "ceiling": sum(spent.values()) / spent["score"],
        "start_up_and_first_cells_seconds": started,
        "credits": "identical",
    }


def require_equal(credits_of: dict[str, list[Credits]]) -> None:
    """Stops the benchmark where two ways disagree on an example."""
    expected = credits_of["one"]
    for name, found in credits_of.items():
        for ours, theirs in zip(expected, found, strict=False):
            for task, values in ours.items():
                if not np.array_equal(values, theirs[task]):
                    raise SystemExit(f"{name} gives other credits on {task}")


def with_examples(plan_file: Path, count: int) -> Path:
    """The plan with so many validation examples of each task, beside it."""
    document = yaml.safe_load(plan_file.read_text())
    for task in document["tasks"]:
        task["examples"] = {"validation": count}
    path = plan_file.with_name("speed-plan.yaml")
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def main() -> None:
    """Measure, or score one folder for ``commands``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", type=int, default=24, help="of a group; at least 8")
    parser.add_argument("--examples", type=int, default=200, help="of each task")
    parser.add_argument("--loop-cells", type=int, default=4, help="of commands and loop in each round")
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.score is not None:
        found = load_and_score(read_plan(arguments.scratch), arguments.score, {})
        print(json.dumps({task: values.tolist() for task, values in found.items()}))
        return
    torch.set_num_threads(1)
    plan_file = with_examples(prepare(arguments.scratch), arguments.examples)
    work = arguments.scratch / "speed"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    document = {
        "results": [measure(plan_file, method, arguments, work) for method in arguments.methods],
        "cells": arguments.cells,
        "examples": 2 * arguments.examples,
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processors": os.cpu_count(),
            "machine": platform.machine(),
        },
    }
    shutil.rmtree(work)
    print(json.dumps(document, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
