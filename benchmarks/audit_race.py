"""What the race of attacks saves in an audit: processor time by stage, with the same verdicts, in one run.

    python -m benchmarks.real_experts.experts SCRATCH --study vision
    python benchmarks/audit_race.py SCRATCH/vision [--before OTHER/src] [--rounds 1]
        [--out benchmarks/results/audit_race.json]

Runs one audit, by one worker in a process of its own, in two ways after one another: with every attack on every example
(``doubt: 0``; with ``--before`` the whole of another build of this project, such as the one before there was a race),
and as it is. Prints one JSON object: processor seconds of every stage of both, their ratio, how many examples were met
of how many, and whether the verdicts are the same: the attacks chosen, and each D* within the other's interval.
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
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from unmergeable.evaluation import audit

PLAN: dict[str, Any] = {
    "base": "base",
    "experts": [{"name": name, "path": f"expert-{name}", "task": name} for name in ("mnist", "animal")],
    "protect": {"expert": "mnist", "methods": ["mergelock"]},
    "merges": ["task_arithmetic"],
    "recoveries": ["kabsch", "nearest_orbit"],
    "coefficients": {"defended": [0.5, 0.75, 1.0, 1.5], "rider": [0.5, 0.75, 1.0], "refinements": 8},
    "connectivity": 0,
    "threat_models": ["off_the_shelf", "white_box"],
    "tasks": [
        {
            "name": name,
            "validation": f"{name}-validation.npz",
            "test": f"{name}-judge.npz",
            "head": f"{name}-head.safetensors",
            "examples": {"validation": 200, "test": 250},
            "batch_size": 50,
        }
        for name in ("mnist", "animal")
    ],
}
"""Vision transformers of 22 million weights; as plans/audits/vision.yaml, with fewer methods and without training."""


def run_here(plan: Path, out: Path, root: Path) -> dict[str, Any]:
    """The audit in this process, with one thread. Returns seconds by stage and what is compared."""
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    last = time.process_time()

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        nonlocal last
        now = time.process_time()
        seconds[stage] = seconds.get(stage, 0.0) + now - last
        last = now

    result = audit(plan, out=out, workers=1, progress=progress, root=root).to_json()
    seconds["judging"] = time.process_time() - last
    cells = [json.loads(path.read_text()) for path in (out / "cells").glob("*.json")]
    met = {
        part: sum(
            len(values) for cell in cells if cell["recipe"]["part"] == part for values in cell["credits"].values()
        )
        for part in ("validation", "test")
    }
    verdicts = {
        f"{name}, {tier}, {trial['rider']}": {
            **{key: trial[key] for key in ("d_star", "interval", "unprotected", "protected", "without_victim")},
            "chosen": {
                who: [attack["recovery"], attack["merge"], attack["coefficients"]]
                for who, attack in trial["best"].items()
            },
        }
        for name, protection in result["protections"].items()
        for tier, found in protection["tiers"].items()
        for trial in found["trials"]
    }
    return {
        "cpu_seconds": sum(seconds.values()),
        "by_stage": seconds,
        "examples_met": met,
        "passed": result["passed"],
        "verdicts": verdicts,
    }


def run_elsewhere(way: Mapping[str, Any], root: Path, work: Path) -> dict[str, Any]:
    """The audit in a process of its own, with the modules of some folder."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    plan = work / "plan.yaml"
    plan.write_text(yaml.safe_dump({**PLAN, **way["entries"]}, sort_keys=False))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(way["modules"])}
    command = [sys.executable, __file__, str(root), "--one", str(plan), str(work / "out")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Whether two audits say the same."""
    pairs = [(before["verdicts"][place], found) for place, found in after["verdicts"].items()]
    with_figure = [(old, new) for old, new in pairs if old["d_star"] is not None and new["d_star"] is not None]
    return {
        "verdicts": len(pairs),
        "same_choices": sum(old["chosen"] == new["chosen"] for old, new in pairs),
        "d_star_in_the_other_interval": sum(
            old["interval"][0] <= new["d_star"] <= old["interval"][1] for old, new in with_figure
        ),
        "of": len(with_figure),
        "largest_difference_of_d_star": max(
            (abs(old["d_star"] - new["d_star"]) for old, new in with_figure), default=0
        ),
        "largest_difference_of_an_end": max(
            (
                abs(one - other)
                for old, new in with_figure
                for one, other in zip(old["interval"], new["interval"], strict=True)
            ),
            default=0,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--before", type=Path, help="src of the build to compare with")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where the audits go; STUDY/race if not given")
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--one", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(run_here(*arguments.one, arguments.study)))
        return
    here = Path(__file__).parents[1] / "src"
    before = {"modules": arguments.before or here, "entries": {} if arguments.before else {"doubt": 0}}
    ways = {"before": before, "after": {"modules": here, "entries": {}}}
    work = arguments.work or arguments.study / "race"
    rounds = []
    for _ in range(arguments.rounds):
        found = {name: run_elsewhere(way, arguments.study.resolve(), work / name) for name, way in ways.items()}
        seconds = {name: one["cpu_seconds"] for name, one in found.items()}
        print(f"{seconds['before']:.0f} and {seconds['after']:.0f} CPU seconds", file=sys.stderr, flush=True)
        rounds.append({**found, "after / before": seconds["after"] / seconds["before"], **compared(**found)})
    document = {
        "before": "another build" if arguments.before else "doubt: 0",
        "plan": PLAN,
        "rounds": rounds,
        "median after / before": median(one["after / before"] for one in rounds),
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processors": os.cpu_count(),
            "machine": platform.machine(),
        },
    }
    print(json.dumps(document, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
