"""Table B: every protection after every recovery, merged; digits with animals (images), questions with films (texts).

    python -m benchmarks.real_experts.recoveries_table SCRATCH [--study vision|text]… [--limit N]
        [--rows PATTERN] [--columns PATTERN] [--out benchmarks/results/recoveries_table.json]

The attacker has the base, the released model and an expert of their own, and knows the method. A recovery works on
the release, which is then merged by task arithmetic with the coefficient that does best for the unprotected expert; or
it works on that merge (``unmask``, ``grad_erase``, ``few_shot``). Where feed-forwards cannot be merged, training starts
from a merge with the base's in their place. Labelled examples of the owner's task, 16 or 100, come from its validation
part, which nothing here is scored on; training takes 40 steps at one learning rate, without a sweep, and starts from
the free-rider's expert for the column without a victim. ``layerwise_ridge`` sees 300 inputs of the owner's
training part, without labels.

Accuracies are on the first 250 test examples of each task. A refusal is an empty field: the JSON says why.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any, Literal

import numpy as np
import torch
from benchmarks.real_experts.claims import Claim, Verdict, below, claims_table, gain_at_most, stays_below
from benchmarks.real_experts.documents import write
from benchmarks.real_experts.experts import STUDIES, Study, prepare
from benchmarks.real_experts.protected import (
    PROTECTIONS,
    UNPROTECTED,
    Protection,
    is_polynomial,
    release,
    with_base_feed_forwards,
)
from benchmarks.real_experts.rows import Row, Rows, accuracy, from_text, to_text
from benchmarks.real_experts.scoring import PUBLISHED_COEFFICIENT, Difference, Right, Scorer, State, read_state

from unmergeable import ops
from unmergeable.attacks import FewShot
from unmergeable.attacks.few_shot import few_shot
from unmergeable.errors import BadInput, UnmergeableError
from unmergeable.merges import TaskArithmetic, merge_state_dicts
from unmergeable.merges.task_vectors import TaskVectors

LIMIT = 250
NO_VICTIM = "no victim"


@dataclass(frozen=True)
class Recovery:
    """A column.

    Attributes:
        name: of the column.
        methods: recoveries applied one after another; none for the release as it is.
        works_on: the release, which is merged afterwards, or the merge.
        reads: what it gets besides the base: "siblings" (public), "release", "examples" (unlabelled), "labels".
        settings: of the last method.
        against: pattern for the protections that it is tried on.
    """

    name: str
    methods: tuple[str, ...] = ()
    works_on: Literal["release", "merge"] = "release"
    reads: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    against: str = ""


_TRAINING = {"samples": 100, "learning_rates": "3e-5", "steps": 40}


def _few_shot(samples: int) -> Recovery:
    return Recovery(f"few_shot {samples}", ("few_shot",), "merge", ("labels",), {**_TRAINING, "samples": samples})


_CHANGED = "unprotected|mergeguard|sensitivity"
"""Protections that change the function: subtracting the release or avoiding its direction makes sense for these."""

ATTACKS = (
    Recovery("none"),
    Recovery("revert_to_base", ("revert_to_base",)),
    Recovery("kabsch", ("kabsch",)),
    Recovery("neuron_matching", ("neuron_matching",)),
    Recovery("diagonal_ratio", ("diagonal_ratio",)),
    Recovery("nearest_orbit", ("nearest_orbit",)),
    Recovery("taylor_inversion", ("taylor_inversion",)),
    Recovery("taylor_inversion, nearest_orbit", ("taylor_inversion", "nearest_orbit")),
    Recovery("task_vector_rescale", ("task_vector_rescale",)),
    Recovery("source_subtraction", ("source_subtraction",), reads=("siblings",)),
    Recovery("layerwise_ridge", ("layerwise_ridge",), reads=("examples",), settings={"examples": 300}),
    Recovery("unmask at 0.3", ("unmask",), "merge", ("release",), {"rescale": True}, _CHANGED),
    Recovery(
        "grad_erase 100", ("grad_erase",), "merge", ("release", "labels"), {"samples": 100, **_TRAINING}, _CHANGED
    ),
    _few_shot(16),
    _few_shot(100),
)

ROWS = (
    UNPROTECTED,
    "mergelock",
    "mergelock, condition 1000",
    "params",
    "gauge",
    "taylor_mlp",
    "mergebarrier, attention",
    "mergebarrier",
    "mergeguard",
    "sensitivity_shield, global",
    "sensitivity_shield, combined",
)


class Attacker:
    """Merges releases with the free-rider's expert, before or after undoing what a protection did."""

    def __init__(self, study: Study, *, limit: int) -> None:
        self.scorer = Scorer(study, limit=limit)
        self.study = study
        self.tasks = (study.owner, study.rider)

    @cached_property
    def rider(self) -> State:
        return read_state(self.study.expert(self.study.rider))

    @cached_property
    def coefficient(self) -> float:
        """What does best on validation examples for the unprotected expert."""
        owner = read_state(self.study.expert(self.study.owner))
        return self.scorer.best_coefficient(TaskVectors.between(self.scorer.base, [owner, self.rider]), self.tasks)

    def merged(self, weights: State) -> State:
        """Task arithmetic with the free-rider's expert.

        Raises:
            Mismatch: the weights are not those of the base's network.
        """
        return merge_state_dicts(
            self.scorer.base, [weights, self.rider], method=TaskArithmetic(), coefficients=[self.coefficient] * 2
        )

    def cell(self, released: Path, recovery: Recovery) -> Row:
        """Scores of the merge after a recovery; or why there is none."""
        began, facts = process_time(), Row()
        with tempfile.TemporaryDirectory(dir=self.study.folder) as place:
            try:
                if recovery.works_on == "release":
                    folder, facts = self._recovered(released, recovery, Path(place))
                    weights = self.merged(read_state(folder))
                else:
                    weights = self._after_merging(released, recovery, Path(place))
            except UnmergeableError as error:
                return {"right": None, "refusal": str(error)}
        spent = process_time() - began
        return {"right": to_text(self.scorer.right(weights, self.tasks)), "cpu_seconds": spent, **facts}

    def _recovered(self, released: Path, recovery: Recovery, place: Path) -> tuple[Path, Row]:
        """The recovered checkpoint, and its distances to the base where the recovery fits any."""
        folder, facts = released, Row()
        for method in recovery.methods:
            out = place / method
            inputs: dict[str, Any] = {"settings": recovery.settings if method == recovery.methods[-1] else {}}
            if "siblings" in recovery.reads:
                inputs["sources"] = [self.study.expert(task) for task in self.study.siblings]
            if "examples" in recovery.reads:
                inputs["data"] = self.study.data(self.study.owner, "train")
            result = ops.recover(folder, base=self.study.base, method=method, out=out, **inputs)
            folder, facts = out, {"distances": _distances(result.parts)} if result.parts else {}
        return folder, facts

    def _after_merging(self, released: Path, recovery: Recovery, place: Path) -> State:
        (method,) = recovery.methods
        if method == FewShot.name:
            weights = with_base_feed_forwards(self.study, released) if is_polynomial(released) else read_state(released)
            return self.trained(self.merged(weights), recovery)
        merge = place / "merge"
        # With a large coefficient subtracting the release blows up what is left: unmask is published at 0.3.
        coefficient = PUBLISHED_COEFFICIENT if method == "unmask" else self.coefficient
        experts = [(released, coefficient), (self.study.expert(self.study.rider), coefficient)]
        ops.merge(base=self.study.base, experts=experts, method="task_arithmetic", out=merge)
        inputs: dict[str, Any] = {"sources": [released], "settings": dict(recovery.settings)}
        if method == "unmask":
            inputs["settings"]["scaling_coefficient"] = coefficient
        if "labels" in recovery.reads:
            inputs |= {
                "data": self.study.data(self.study.owner, "validation"),
                "head": self.study.head(self.study.owner),
            }
        ops.recover(merge, base=self.study.base, method=method, out=place / method, **inputs)
        return read_state(place / method)

    def trained(self, weights: State, recovery: Recovery) -> State:
        """Weights after training on a few labelled examples of the owner's task."""
        settings: dict[str, Any] = dict(recovery.settings)
        task = self.study.task(self.study.owner, "validation", limit=settings["samples"])
        return few_shot(self.scorer.network, weights, task, FewShot(**settings)).weights

    def without_victim(self, recovery: Recovery) -> Row:
        """The free-rider's expert alone, or trained on the same examples."""
        if not recovery.methods:
            return {"right": to_text(self.scorer.right(self.rider, self.tasks))}
        if recovery.methods != (FewShot.name,):
            return {"right": None, "refusal": "there is nothing to recover"}
        began = process_time()
        weights = self.trained(self.rider, recovery)
        spent = process_time() - began
        return {"right": to_text(self.scorer.right(weights, self.tasks)), "cpu_seconds": spent}


def _distances(parts: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Means over blocks of the relative distance to the base after and before, of each part."""
    found: dict[str, list[tuple[float, float]]] = {}
    for part in parts:
        found.setdefault(part["part"], []).append((part["after"], part["before"]))
    return {
        name: (fmean(after for after, _ in pairs), fmean(before for _, before in pairs))
        for name, pairs in found.items()
    }


@dataclass(frozen=True)
class Table:
    """Cells that are there, by protection and recovery."""

    study: Study
    cells: Mapping[str, Mapping[str, Row]]
    coefficient: float
    base: Row

    def right(self, protection: str, recovery: str, task: str) -> Right | None:
        """What a merge gets right; None where it is missing or refused."""
        answers = self.cells.get(protection, {}).get(recovery, {}).get("right")
        return None if answers is None else from_text(answers[task])


def tabulate(study: Study, *, rows: str, columns: str, limit: int) -> Table:
    """Compute the cells whose row and column two patterns find, and collect all that are there."""
    store = Rows(study, "recoveries", limit=limit)
    attacker = cache(lambda: Attacker(study, limit=limit))
    reference = store.get({"table": "coefficient"}, lambda: _reference(attacker()), label="coefficient")
    protections = {protection.name: protection for protection in PROTECTIONS}
    cells: dict[str, dict[str, Row]] = {}
    for name in (*ROWS, NO_VICTIM):
        protection = protections.get(name)
        for recovery in ATTACKS:
            recipe = {"table": "recoveries", "protection": protection and asdict(protection), **asdict(recovery)}
            wanted = re.search(rows, name) and re.search(columns, recovery.name) and re.search(recovery.against, name)
            if not (store.has(recipe) or wanted) or not set(recovery.methods) <= api_recoveries():
                continue
            try:
                compute = partial(_cell, attacker, protection, recovery)
                found = store.get(recipe, compute, label=f"{name}, {recovery.name}")
                cells.setdefault(name, {})[recovery.name] = found
            except BadInput as error:  # the protection itself refused
                print(f"{study.name}: {name}: {error}", flush=True)
                break
    return Table(study, cells, reference["coefficient"], reference["base"])


def api_recoveries() -> set[str]:
    """The recoveries there are."""
    return {item["name"] for item in ops.methods().recoveries}


def _reference(attacker: Attacker) -> Row:
    base = to_text(attacker.scorer.right(attacker.scorer.base, attacker.tasks))
    return {"coefficient": attacker.coefficient, "base": base}


def _cell(attacker: Callable[[], Attacker], protection: Protection | None, recovery: Recovery) -> Row:
    if protection is None:
        return attacker().without_victim(recovery)
    return attacker().cell(release(attacker().study, protection).folder, recovery)


def claims(table: Table) -> list[Claim]:
    """Published expectations, and whether a stronger attack leaves them standing."""
    owner, rider = table.study.owner, table.study.rider
    found: list[Claim] = []

    def both(*cells: tuple[str, str]) -> list[Right] | None:
        answers = [table.right(*cell, owner) for cell in cells]
        return None if any(one is None for one in answers) else [one for one in answers if one is not None]

    for name in ("mergelock", "mergelock, condition 1000"):
        if pair := both((name, "none"), (name, "kabsch")):
            text = f"kabsch regains at most 15 points of what {name} takes from a merge"
            found.append(gain_at_most(text, "2 to 15 points", 15.0, *pair))
    for name, attack, published in BROKEN:
        if pair := both((name, attack), (UNPROTECTED, "none")):
            text = f"{name}: a merge after {attack} stays below that of the unprotected expert"
            sides = [("after the attack", pair[0]), ("unprotected", pair[1])]
            found.append(stays_below(text, published, *sides))
    found += _neuron_claim(table)
    if pair := both(("mergebarrier", FULL_TUNING), ("taylor_mlp", FULL_TUNING)):
        sides = [("mergebarrier", pair[0]), ("taylor_mlp", pair[1])]
        text = "training on 100 examples recovers mergebarrier less than taylor_mlp"
        found.append(below(text, "SFT recovers TaylorMLP more", *sides))
    for attack, published in (("unmask at 0.3", "40.3 to 64.6 %"), ("grad_erase 100", "40.3 to 51.8 %")):
        cells = [
            [table.right("mergeguard", recovery, task) for task in (owner, rider)] for recovery in ("none", attack)
        ]
        if all(one is not None for cell in cells for one in cell):
            # Both tasks together: the published figures are averages over the merged experts' tasks.
            before, after = (np.concatenate([one for one in cell if one is not None]) for cell in cells)
            text = f"{attack} regains part of what mergeguard takes from a merge (both tasks)"
            found.append(below(text, published, ("before", before), ("after", after)))
    return found


FULL_TUNING = "few_shot 100"

BROKEN = (
    ("mergelock", "nearest_orbit", "holds against alignment"),
    ("mergelock, condition 1000", "nearest_orbit", "holds against alignment"),
    ("params", "nearest_orbit", "holds against alignment"),
    ("gauge", "nearest_orbit", "not published"),
    ("mergebarrier, attention", "nearest_orbit", "not tried"),
    ("taylor_mlp", "taylor_inversion", "not tried"),
    ("mergebarrier", "taylor_inversion, nearest_orbit", "not tried"),
    ("mergeguard", "task_vector_rescale", "not tried"),
    ("sensitivity_shield, global", "source_subtraction", "not tried"),
    ("sensitivity_shield, combined", "source_subtraction", "not tried"),
)
"""Protections, the strongest data-free attack on each here, and what its paper says of such attacks."""

SAME = 1.02
"""A distance to the base at most this many times the unprotected expert's is called the same."""


def _neuron_claim(table: Table) -> list[Claim]:
    """Whether matching neurons undoes the permutation of params, from distances: rescaling is not its business."""
    cells = [table.cells.get(name, {}).get("neuron_matching", {}) for name in ("params", UNPROTECTED)]
    if not all("distances" in cell for cell in cells):
        return []
    after, before = cells[0]["distances"]["feed_forward"]
    plain = cells[1]["distances"]["feed_forward"][1]
    ours = f"distance of feed-forwards to the base {before:.3f} before, {after:.3f} after, {plain:.3f} unprotected"
    holds: Verdict = "yes" if after <= SAME * plain else "no"
    return [Claim("neuron_matching undoes the permutation of params", "the Hungarian step undoes it", ours, holds)]


def to_json(table: Table) -> dict[str, Any]:
    """Accuracies, and differences from the unprotected expert's merge without a recovery; without single answers."""
    study = table.study
    missing = [name for name in ROWS if name not in table.cells]
    missing += [recovery.name for recovery in ATTACKS if not set(recovery.methods) <= api_recoveries()]
    return {
        "owner": study.owner,
        "rider": study.rider,
        "coefficient": table.coefficient,
        "examples": len(from_text(table.base[study.owner])),
        "base": {task: accuracy(text) for task, text in table.base.items()},
        "rows": {
            protection: {recovery: _cell_to_json(table, cell) for recovery, cell in cells.items()}
            for protection, cells in table.cells.items()
        },
        "missing": missing,
        "claims": [claim.to_json() for claim in claims(table)],
    }


def _cell_to_json(table: Table, cell: Row) -> dict[str, Any]:
    if cell["right"] is None:
        return {"refused": cell["refusal"].replace(f"{table.study.folder}/", "")}
    owner = table.study.owner
    found: dict[str, Any] = {task: accuracy(text) for task, text in cell["right"].items()}
    found |= {key: cell[key] for key in ("distances",) if key in cell}
    if "cpu_seconds" in cell:
        found["cpu_seconds"] = round(cell["cpu_seconds"], 1)
    plain = table.right(UNPROTECTED, "none", owner)
    if plain is not None:
        found["lost"] = Difference.between(from_text(cell["right"][owner]), plain).to_json()
    return found


def markdown(study: str, document: Mapping[str, Any]) -> list[str]:
    """The table of a study, recoveries as rows."""
    owner, rider = document["owner"], document["rider"]
    protections = list(document["rows"])
    lines = [
        f"### {study}: {owner} (the owner's) merged with {rider} (the free-rider's) after a recovery",
        "",
        f"Accuracies in per cent of {document['examples']} examples, {owner} / {rider}; task arithmetic, coefficient "
        f"{document['coefficient']} for both. Base {document['base'][owner]} / {document['base'][rider]}. In italics: "
        "no real loss against the merge of the unprotected expert. Empty: refused, or not tried.",
        "",
        "| recovery | " + " | ".join(protections) + " |",
        "|---|" + "---|" * len(protections),
    ]
    for recovery in ATTACKS:
        cells = [_text(document["rows"][name].get(recovery.name), owner, rider) for name in protections]
        if any(cells):
            lines.append(f"| {recovery.name} | " + " | ".join(cells) + " |")
    if document["missing"]:
        lines += ["", f"Not there yet: {', '.join(document['missing'])}."]
    return [*lines, "", *claims_table([Claim(**claim) for claim in document["claims"]]), ""]


def _text(cell: Mapping[str, Any] | None, owner: str, rider: str) -> str:
    if cell is None or "refused" in cell:
        return ""
    first = f"{cell[owner]}"
    if "lost" in cell and not (cell["lost"]["real"] and cell["lost"]["points"] > 0):
        first = f"*{first}*"
    return f"{first} / {cell[rider]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--study", choices=list(STUDIES), action="append")
    parser.add_argument("--rows", default="", help="regular expression: the protections to compute; default all")
    parser.add_argument("--columns", default="", help="regular expression: the recoveries to compute; default all")
    parser.add_argument("--limit", type=int, default=LIMIT, help="test examples of each task")
    parser.add_argument("--out", type=Path, metavar="JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document = {}
    for name in arguments.study or STUDIES:
        study = STUDIES[name](arguments.scratch)
        prepare(study)
        table = tabulate(study, rows=arguments.rows, columns=arguments.columns, limit=arguments.limit)
        document[name] = to_json(table)
    write(document, arguments.out, markdown)


if __name__ == "__main__":
    main()
