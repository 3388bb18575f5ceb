"""Table A: every protection alone and merged, on digits with animals (images) and questions with film reviews (texts).

    python -m benchmarks.real_experts.protections_table SCRATCH [--study vision|text]… [--rows PATTERN] [--limit N]
        [--out benchmarks/results/protections_table.json]

The owner's expert is protected and scored alone; then it is merged with the free-rider's, which is not protected:

    linear                    average of both
    task_arithmetic           scaling coefficient 0.3 for both, as published
    task_arithmetic, best     of 0.3, 0.5, 0.7 and 0.9, what does best on 200 validation examples of each task
    ties                      density 0.2, coefficient 1

Where a protection leaves feed-forwards that no merge takes, the row says so, and a second row shows what comes of
putting the base's there. Accuracies are on 500 test examples of each task. Writes JSON, and the table beside it as
Markdown; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.real_experts.claims import Claim, below, claims_table, loss_at_most, not_above
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
from benchmarks.real_experts.scoring import PUBLISHED_COEFFICIENT, Difference, Scorer, State, read_state

from unmergeable.attacks.distance import block_distances
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import BadInput, Mismatch
from unmergeable.network.polynomial_network import load_polynomial_network
from unmergeable.ops.opened import open_with_architecture

MERGES = ("linear", "task_arithmetic", "task_arithmetic, best", "ties")
REVERTED = "base's feed-forwards put back"


def compute_row(get_scorer: Callable[[], Scorer], protection: Protection) -> Row:
    """Protect, score alone, merge in every way, score."""
    scorer = get_scorer()
    study = scorer.study
    released = release(study, protection)
    row: Row = {"cpu_seconds": released.cpu_seconds, "peak_mb": released.peak_mb, "facts": released.facts}
    row["distances"] = distances(study, released.folder)
    if is_polynomial(released.folder):
        network = load_polynomial_network(released.folder)
        row["alone"] = to_text(scorer.answers(network, [study.owner]))
        row["merged"], row["refusal"] = merged(scorer, read_state(released.folder))
        row[REVERTED], _ = merged(scorer, with_base_feed_forwards(study, released.folder))
    else:
        weights = read_state(released.folder)
        row["alone"] = to_text(scorer.right(weights, [study.owner]))
        row["merged"], row["refusal"] = merged(scorer, weights)
    return row


def merged(scorer: Scorer, weights: State) -> tuple[dict[str, Any] | None, str]:
    """Scores of all merges with the free-rider's expert; or None, and what refused them."""
    study = scorer.study
    try:
        found = scorer.merges(weights, read_state(study.expert(study.rider)), (study.owner, study.rider))
    except Mismatch as error:
        return None, str(error)
    return {name: {"right": to_text(one.right), "coefficient": one.coefficient} for name, one in found.items()}, ""


def distances(study: Study, folder: Path) -> dict[str, float] | None:
    """Mean over blocks of the Frobenius distance to the base, of each part; None where the structure differs."""
    if is_polynomial(folder):
        return None
    base, architecture = open_with_architecture(study.base)
    found: dict[str, list[float]] = {}
    for distance in block_distances(open_checkpoint(folder), base, architecture):
        found.setdefault(distance.part, []).append(distance.difference)
    return {part: float(np.mean(values)) for part, values in found.items()}


def references(scorer: Scorer) -> Row:
    """The base and the free-rider's expert on both tasks: what there is without the victim."""
    study = scorer.study
    tasks = (study.owner, study.rider)
    return {
        "base": to_text(scorer.right(scorer.base, tasks)),
        "rider": to_text(scorer.right(read_state(study.expert(study.rider)), tasks)),
        "owner": to_text(scorer.right(read_state(study.expert(study.owner)), tasks)),
    }


@dataclass(frozen=True)
class Table:
    """The rows of a study that are there, by name, and what the models were without any protection."""

    study: Study
    references: Row
    rows: Mapping[str, Row]

    def alone(self, name: str) -> Any:
        """What a protected expert gets right on its own task."""
        return from_text(self.rows[name]["alone"][self.study.owner])

    def merged(self, name: str, merge: str, task: str) -> Any:
        """What a merge with the free-rider's expert gets right; where refused, with the base's put back."""
        row = self.rows[name]
        return from_text((row["merged"] or row[REVERTED])[merge]["right"][task])

    def base(self, task: str) -> Any:
        """What the base gets right."""
        return from_text(self.references["base"][task])


def claims(table: Table) -> list[Claim]:
    """The published claims that the rows of a table speak of."""
    owner = table.study.owner
    found: list[Claim] = []

    def held(*names: str) -> bool:
        return all(name in table.rows for name in names)

    for name, published in COLLAPSES.items():
        if held(name):
            pair = (f"{name}, merged", table.merged(name, MERGES[1], owner)), ("the base", table.base(owner))
            found.append(not_above(f"{name}: a merge at 0.3 is no better than the base", published, *pair))
    for name, (bound, published) in UTILITY.items():
        if held(name, UNPROTECTED):
            text = f"{name}: at most {bound:g} points lost alone"
            found.append(loss_at_most(text, published, bound, table.alone(UNPROTECTED), table.alone(name)))
    for lower, higher, published in ORDERS:
        for merge, label in ((MERGES[1], "at 0.3"), (MERGES[2], "at the best coefficient")):
            if held(lower, higher):
                sides = [(name, table.merged(name, merge, owner)) for name in (lower, higher)]
                found.append(below(f"merged {label}, {lower} is left with less than {higher}", published, *sides))
    for part, published in (("query_key", "270 and 20"), ("value_output", "115 and 9.6")):
        if held("mergelock", "mergelock, condition 1000", "params"):
            far, strong, near = (
                table.rows[name]["distances"][part] for name in ("mergelock", "mergelock, condition 1000", "params")
            )
            ours = f"{far:.1f} ({strong:.1f} at condition 1000) and {near:.1f}"
            text = f"mergelock moves {part.replace('_', ' and ')} further from the base than params"
            found.append(Claim(text, published, ours, "yes" if far > near else "no"))
    return found


COLLAPSES = {
    "mergelock": "78 to 91 % unprotected, 3.4 to 10 % protected, averages of 8 image tasks",
    "params": "the merge fails",
    "mergebarrier": "8.27 times lower than unprotected",
    "mergeguard": "84.5 to 40.3 %, average of ViT-L/14",
    "sensitivity_shield, combined": "54.1 to 32.7 %, base 34.7 % (GSM8K)",
}
UTILITY = {
    "mergelock": (0.0, "exact"),
    "params": (0.0, "exact"),
    "mergebarrier": (0.9, "at most 0.9"),
    "mergeguard": (1.5, "mostly below 1.5, at most 4.4"),
    "sensitivity_shield, combined": (6.8, "6.8 (GSM8K 71.87 to 65.07)"),
}
ORDERS = (
    ("mergebarrier", "mergebarrier, attention", "attention alone is left with 3.79 times as much"),
    ("mergebarrier", "mergebarrier, ffn", "feed-forwards alone are left with 7.19 times as much"),
    ("mergebarrier, attention", "mergebarrier, ffn", "3.79 against 7.19 times"),
    ("mergeguard", "mergeguard, training", "both stages protect best"),
    ("mergeguard", "mergeguard, masking", "both stages protect best"),
    ("sensitivity_shield, combined", "sensitivity_shield, global", "combined protects best"),
    ("sensitivity_shield, combined", "sensitivity_shield, local", "combined protects best"),
    ("sensitivity_shield, combined, all neurons", "sensitivity_shield, combined, random 5 %", "the more is changed"),
)
"""Pairs of which the first is published to leave a merge with less of the owner's skill."""


def to_json(table: Table) -> dict[str, Any]:
    """Accuracies and differences, without the single answers."""
    study = table.study
    tasks = (study.owner, study.rider)
    rows = [_row_to_json(table, name) for name in table.rows]
    reference = {
        name: {task: accuracy(text) for task, text in found.items()} for name, found in table.references.items()
    }
    missing = [protection.name for protection in PROTECTIONS if protection.name not in table.rows]
    return {
        "owner": tasks[0],
        "rider": tasks[1],
        "examples": len(table.base(study.owner)),
        "references": reference,
        "rows": rows,
        "missing": missing,
        "claims": [claim.to_json() for claim in claims(table)],
    }


def _row_to_json(table: Table, name: str) -> dict[str, Any]:
    row, study = table.rows[name], table.study
    found: dict[str, Any] = {"protection": name, "alone": accuracy(row["alone"][study.owner])}
    if UNPROTECTED in table.rows:
        found["lost_alone"] = Difference.between(table.alone(name), table.alone(UNPROTECTED)).to_json()
    for key in ("merged", REVERTED):
        if row.get(key):
            found[key] = {merge: _merge_to_json(table, row[key][merge], merge) for merge in MERGES}
    for key in ("refusal", "distances", "cpu_seconds", "peak_mb"):
        found[key] = round(row[key], 1) if isinstance(row[key], float) else row[key]
    return found


def _merge_to_json(table: Table, merge: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = {task: accuracy(text) for task, text in merge["right"].items()}
    if merge["coefficient"] is not None:
        found["coefficient"] = merge["coefficient"]
    if UNPROTECTED in table.rows:
        owner = table.study.owner
        plain, right = table.merged(UNPROTECTED, name, owner), from_text(merge["right"][owner])
        found["lost"] = Difference.between(right, plain).to_json()
    return found


def markdown(study: str, document: Mapping[str, Any]) -> list[str]:
    """The table of a study."""
    owner, rider, reference = document["owner"], document["rider"], document["references"]
    lines = [
        f"### {study}: {owner} (the owner's) merged with {rider} (the free-rider's)",
        "",
        f"Accuracies in per cent of {document['examples']} examples; merges as {owner} / {rider}. Base "
        f"{_pair(reference['base'], owner, rider)}, owner's expert {_pair(reference['owner'], owner, rider)}, "
        f"free-rider's expert {_pair(reference['rider'], owner, rider)}. In italics: no real loss against the merge of "
        "the unprotected expert.",
        "",
        "| protection | alone (lost) | linear | arithmetic 0.3 | arithmetic, best (coefficient) | TIES | CPU s | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        lost = row.get("lost_alone", {"points": 0.0})["points"]
        head = [row["protection"], f"{row['alone']} ({lost:.1f})"]
        cost = [f"{row['cpu_seconds']:.0f}", f"{row['peak_mb']:.0f}"]
        cells = [_cell(row["merged"][merge], owner, rider) for merge in MERGES] if "merged" in row else ["refused"] * 4
        lines.append("| " + " | ".join([*head, *cells, *cost]) + " |")
        if REVERTED in row:
            cells = [_cell(row[REVERTED][merge], owner, rider) for merge in MERGES]
            lines.append("| " + " | ".join([f"… {REVERTED}", "", *cells, "", ""]) + " |")
    if document["missing"]:
        lines += ["", f"Not there yet: {', '.join(document['missing'])}."]
    found = [Claim(**claim) for claim in document["claims"]]
    return [*lines, "", *claims_table(found), ""]


def _pair(scores: Mapping[str, float], owner: str, rider: str) -> str:
    return f"{scores[owner]} / {scores[rider]}"


def _cell(merge: Mapping[str, Any], owner: str, rider: str) -> str:
    first = f"{merge[owner]}"
    if "lost" in merge and not (merge["lost"]["real"] and merge["lost"]["points"] > 0):
        first = f"*{first}*"
    best = f" ({merge['coefficient']})" if merge.get("coefficient") not in (None, PUBLISHED_COEFFICIENT) else ""
    return f"{first} / {merge[rider]}{best}"


def tabulate(study: Study, *, pattern: str, limit: int | None) -> Table:
    """Compute the rows whose name a pattern finds, and collect all that are there."""
    rows = Rows(study, "protections", limit=limit)
    scorer = cache(lambda: Scorer(study, limit=limit))
    found: dict[str, Row] = {}
    reference = rows.get({"table": "references"}, lambda: references(scorer()), label="references")
    for protection in PROTECTIONS:
        recipe = {"table": "protections", **asdict(protection)}
        if not (rows.has(recipe) or re.search(pattern, protection.name)):
            continue
        try:
            found[protection.name] = rows.get(recipe, partial(compute_row, scorer, protection), label=protection.name)
        except BadInput as error:
            print(f"{study.name}: {protection.name}: {error}", flush=True)
    return Table(study, reference, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--study", choices=list(STUDIES), action="append")
    parser.add_argument("--rows", default="", help="regular expression: the protections to compute; default all")
    parser.add_argument("--limit", type=int, help="test examples of each task; default all 500")
    parser.add_argument("--out", type=Path, metavar="JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document = {}
    for name in arguments.study or STUDIES:
        study = STUDIES[name](arguments.scratch)
        prepare(study)
        document[name] = to_json(tabulate(study, pattern=arguments.rows, limit=arguments.limit))
    write(document, arguments.out, markdown)


if __name__ == "__main__":
    main()
