"""Table C: eight vision tasks, every expert protected with mergelock and merged with every other.

    python -m benchmarks.real_experts.vision_matrix SCRATCH [--workers N] [--limit N]
        [--out benchmarks/results/vision_matrix.json]

For each pair of a protected expert (row) and a free-rider's (column), the accuracy of their merge on the task of the
row. Task arithmetic with the published coefficient 0.3 for both, and with the one of 0.5, 0.7, 0.9 that does best on
validation examples over all pairs of unprotected experts. Four matrices for each coefficient: unprotected; protected;
after ``kabsch``; after ``nearest_orbit``. Mergelock is drawn at condition 1000, which moves weights about as far from
the base as the published one; its default of 4, which half precision can afford, is in the tables of single pairs.

Merges are made in memory and swapped into one network. Accuracies are on the first 250 test images of each task. A run
that was stopped goes on with the next row.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import numpy as np
import torch
from benchmarks.real_experts.claims import Claim, claims_table
from benchmarks.real_experts.documents import write
from benchmarks.real_experts.experts import Part, Study, prepare, vision_study
from benchmarks.real_experts.protected import Protection, release
from benchmarks.real_experts.rows import Row, Rows, accuracy, to_text
from benchmarks.real_experts.scoring import PUBLISHED_COEFFICIENT, Scorer, State, read_state

from unmergeable import api
from unmergeable.network.task_vectors import TaskVectors, score_merges

LIMIT = 250
VALIDATION_LIMIT = 100
"""Images of each task that choose the coefficient; over all pairs there are 5 600."""

BETTER = (0.5, 0.7, 0.9)
PROTECTION = Protection("mergelock", "mergelock", {"condition": 1000.0})
VARIANTS = ("unprotected", "protected", "kabsch", "nearest_orbit")


@dataclass(frozen=True)
class Sweep:
    """One expert merged with every other, and scored on its own task."""

    study: Study
    variant: str
    coefficients: tuple[float, ...]
    part: Part
    limit: int

    @property
    def recipe(self) -> Mapping[str, Any]:
        settings = asdict(PROTECTION) if self.variant != VARIANTS[0] else None
        return {
            "owner": self.study.owner,
            "variant": self.variant,
            "protection": settings,
            "coefficients": self.coefficients,
            "part": self.part,
            "limit": self.limit,
        }

    def compute(self) -> Row:
        """Answers by free-rider, one text for each coefficient."""
        torch.set_num_threads(1)
        began = process_time()
        scorer, owner = Scorer(self.study, limit=self.limit), self.study.owner
        victim = self._victim()
        pairs = [(value, value) for value in self.coefficients]
        found = {}
        for rider in self.study.tasks:
            if rider != owner:
                vectors = TaskVectors.between(scorer.base, [victim, read_state(self.study.expert(rider))])
                answers = score_merges(
                    scorer.network, vectors, pairs, lambda network: scorer.answers(network, [owner], self.part)
                )
                found[rider] = [to_text(one)[owner] for one in answers]
        return {"answers": found, "cpu_seconds": process_time() - began}

    def _victim(self) -> State:
        """The weights that the attacker merges."""
        if self.variant == VARIANTS[0]:
            return read_state(self.study.expert(self.study.owner))
        released = release(self.study, PROTECTION).folder
        if self.variant == VARIANTS[1]:
            return read_state(released)
        with tempfile.TemporaryDirectory(dir=self.study.folder) as place:
            out = Path(place) / self.variant
            api.recover(released, base=self.study.base, method=self.variant, out=out, threads=1)
            return read_state(out)


class Runner:
    """Sweeps on several processes, each kept on disk when it is done."""

    def __init__(self, study: Study, *, limit: int, workers: int) -> None:
        self.study, self.limit, self.workers = study, limit, workers
        self._rows = Rows(study, "matrix", limit=limit)

    def alone(self) -> Row:
        """The base and every expert on its own task."""

        def compute() -> Row:
            scorer, tasks = Scorer(self.study, limit=self.limit), self.study.tasks
            experts = {task: scorer.right(read_state(self.study.expert(task)), [task]) for task in tasks}
            own = {task: to_text(found)[task] for task, found in experts.items()}
            return {"base": to_text(scorer.right(scorer.base, tasks)), "expert": own}

        return self._rows.get({"alone": self.study.tasks}, compute, label="experts alone")

    def sweep(self, variant: str, coefficients: tuple[float, ...], part: Part = "test") -> dict[str, Row]:
        """By protected expert; on disk or computed."""
        limit = self.limit if part == "test" else min(self.limit, VALIDATION_LIMIT)
        sweeps = [
            Sweep(replace(self.study, owner=owner), variant, coefficients, part, limit) for owner in self.study.tasks
        ]
        missing = [one for one in sweeps if not self._rows.has(one.recipe)]
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn")) as pool:
            for one, row in zip(missing, pool.map(Sweep.compute, missing), strict=True):
                self._rows.put(one.recipe, row, label=f"{one.study.owner}, {variant}")
        return {one.study.owner: self._rows.get(one.recipe, one.compute, label="") for one in sweeps}


def better_coefficient(runner: Runner) -> float:
    """The one that does best for unprotected experts on validation examples, over all pairs."""
    found = runner.sweep(VARIANTS[0], BETTER, "validation")
    means = [
        fmean(accuracy(answers[number]) for row in found.values() for answers in row["answers"].values())
        for number in range(len(BETTER))
    ]
    return BETTER[int(np.argmax(means))]


def tabulate(runner: Runner) -> dict[str, Any]:
    """All matrices, as JSON."""
    better = better_coefficient(runner)
    coefficients = (PUBLISHED_COEFFICIENT, better)
    alone = runner.alone()
    sweeps = {variant: runner.sweep(variant, coefficients) for variant in VARIANTS}
    matrices = {
        variant: {str(coefficient): _matrix(sweep, number) for number, coefficient in enumerate(coefficients)}
        for variant, sweep in sweeps.items()
    }
    return {
        "tasks": runner.study.tasks,
        "examples": runner.limit,
        "protection": {"method": PROTECTION.method, "settings": dict(PROTECTION.settings)},
        "coefficients": coefficients,
        "alone": {
            "base": {task: accuracy(text) for task, text in alone["base"].items()},
            "expert": {task: accuracy(text) for task, text in alone["expert"].items()},
            "chance": {task: round(100 / runner.study.classes(task), 1) for task in runner.study.tasks},
        },
        "matrices": matrices,
        "claims": [claim.to_json() for claim in claims(sweeps, alone, better)],
        "cpu_seconds": round(sum(row["cpu_seconds"] for sweep in sweeps.values() for row in sweep.values())),
    }


def _matrix(sweep: Mapping[str, Row], number: int) -> dict[str, Any]:
    """Accuracies by protected expert and free-rider, their averages by row, and the mean of these."""
    cells = {
        owner: {rider: accuracy(answers[number]) for rider, answers in row["answers"].items()}
        for owner, row in sweep.items()
    }
    rows = {owner: round(fmean(found.values()), 1) for owner, found in cells.items()}
    return {"cells": cells, "rows": rows, "mean": round(fmean(rows.values()), 1)}


def claims(sweeps: Mapping[str, Mapping[str, Row]], alone: Row, better: float) -> list[Claim]:
    """The shape of the published matrix, from means over all pairs."""
    base, expert = (fmean(accuracy(text) for text in alone[name].values()) for name in ("base", "expert"))
    found = []
    for number, coefficient in enumerate((PUBLISHED_COEFFICIENT, better)):
        plain, hidden, turned, orbit = (_matrix(sweeps[variant], number)["mean"] for variant in VARIANTS)
        kept = (plain - base) / (expert - base)
        found += [
            Claim(
                f"coefficient {coefficient}: merges of unprotected experts keep half of what the experts learnt",
                "78 to 91 %",
                f"{plain:.1f} (base {base:.1f}, experts {expert:.1f}: {100 * kept:.0f} % kept)",
                "yes" if kept >= 0.5 else "no",
            ),
            Claim(
                f"coefficient {coefficient}: merges of protected experts are worse than the base",
                "3.4 to 10 %",
                f"{hidden:.1f} (base {base:.1f})",
                "yes" if hidden < base else "no",
            ),
            Claim(
                f"coefficient {coefficient}: kabsch regains at most 15 points",
                "2 to 15 points",
                f"{hidden:.1f} to {turned:.1f}",
                "yes" if turned - hidden <= 15 else "no",
            ),
            Claim(
                f"coefficient {coefficient}: no alignment brings a merge near the unprotected one (95 % of it)",
                "alignment fails",
                f"{orbit:.1f} after nearest_orbit, {plain:.1f} unprotected",
                "yes" if orbit < 0.95 * plain else "no",
            ),
        ]
    return found


def markdown(study: str, document: Mapping[str, Any]) -> list[str]:
    """Rows are protected experts, scored on their own task; columns the free-riders' they are merged with."""
    tasks, alone = document["tasks"], document["alone"]
    lines = [
        f"### {study}: eight tasks, {document['protection']['method']} at condition "
        f"{document['protection']['settings']['condition']:g}",
        "",
        f"Accuracy in per cent of {document['examples']} test images on the task of the row, after a merge with the "
        "expert for the task of the column.",
        "",
        "| | " + " | ".join(tasks) + " |",
        "|---|" + "---|" * len(tasks),
    ]
    lines += [f"| {name} | " + " | ".join(str(alone[name][task]) for task in tasks) + " |" for name in alone]
    lines += ["", *_means(document), ""]
    for variant, by_coefficient in document["matrices"].items():
        for coefficient, matrix in by_coefficient.items():
            lines += [f"**{variant}, coefficient {coefficient}**", "", *_lines(matrix, tasks), ""]
    return [*lines, *claims_table([Claim(**claim) for claim in document["claims"]]), ""]


def _means(document: Mapping[str, Any]) -> list[str]:
    """Means over all pairs."""
    coefficients = [str(value) for value in document["coefficients"]]
    lines = ["| mean of all pairs | " + " | ".join(f"coefficient {value}" for value in coefficients) + " |"]
    lines.append("|---|" + "---|" * len(coefficients))
    for variant, found in document["matrices"].items():
        lines.append(f"| {variant} | " + " | ".join(str(found[value]["mean"]) for value in coefficients) + " |")
    return lines


def _lines(matrix: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    lines = ["| | " + " | ".join(tasks) + " | average |", "|---|" + "---|" * (len(tasks) + 1)]
    for owner, cells in matrix["cells"].items():
        values = [str(cells.get(rider, "")) for rider in tasks]
        lines.append(f"| {owner} | " + " | ".join(values) + f" | {matrix['rows'][owner]} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, default=LIMIT, help="test images of each task")
    parser.add_argument("--out", type=Path, metavar="JSON")
    arguments = parser.parse_args()
    study = vision_study(arguments.scratch)
    prepare(study)
    runner = Runner(study, limit=arguments.limit, workers=arguments.workers)
    write({study.name: tabulate(runner)}, arguments.out, markdown)


if __name__ == "__main__":
    main()
