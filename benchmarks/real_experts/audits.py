"""Audits of every protection on real experts: what each is worth against attackers of rising means.

    python -m benchmarks.real_experts.audits SCRATCH --study text|vision [--tiers T0,T1,T2]
        [--examples VALIDATION TEST] [--workers N] [--out FILE]

Prepares the study (:mod:`benchmarks.real_experts.experts`) unless it is there, writes ``SCRATCH/STUDY/plan.yaml``, and
runs ``unmergeable audit`` on it into ``SCRATCH/STUDY/audit``; started again it goes on where it was. Writes the result
without its cells as JSON, and the block for a model card beside it as Markdown. The page is
``SCRATCH/STUDY/audit/report.html``.

What the protections read of the owner's are the examples its expert was trained on. An attacker who learns has others:
the last 250 of the test part, on which nothing is scored.

An accuracy on 250 test examples is known to about 5 points, a D* to the interval given. With 100 validation examples
the selection of attacks is so much a matter of luck that the control ``scale`` fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.real_experts.audited import audit_study, parser_of
from benchmarks.real_experts.experts import STUDIES, Study, prepare
from benchmarks.real_experts.protected import PROTECTIONS, Protection

AUDITED = (
    "mergelock",
    "mergelock, condition 1000",
    "params",
    "gauge",
    "taylor_mlp",
    "mergebarrier",
    "mergeguard",
    "sensitivity_shield, combined",
)

ATTACKERS = 250
"""Test examples that are an attacker's to learn from, and never scored."""

ATTACKS = ("kabsch", "nearest_orbit", "taylor_inversion, nearest_orbit")
"""Besides source_subtraction, which is given the siblings."""


def plan(study: Study, tiers: Sequence[str], examples: tuple[int, int]) -> dict[str, Any]:
    """The audit of a study, with paths that start beside its experts."""
    by_name = {protection.name: protection for protection in PROTECTIONS}
    siblings = [study.expert(task).name for task in study.siblings]
    for task in (study.owner, study.rider):
        divide_test(study, task)
    return {
        "base": "base",
        "experts": [
            {"name": task, "path": study.expert(task).name, "task": task} for task in (study.owner, study.rider)
        ],
        "protect": {"expert": study.owner, "methods": [_method(study, by_name[name]) for name in AUDITED]},
        "merges": ["task_arithmetic"],
        "recoveries": [*ATTACKS, {"method": "source_subtraction", "sources": siblings}],
        "coefficients": {"defended": [0.5, 0.75, 1.0, 1.5], "rider": [0.5, 0.75, 1.0], "refinements": 8},
        "connectivity": 5,
        "tiers": list(tiers),
        "few_shot": {"samples": [100], "starts": 2, "settings": {"steps": 30, "learning_rates": "3e-6,1e-5,3e-5"}},
        "tasks": [_task(study, task, examples) for task in (study.owner, study.rider)],
    }


def _method(study: Study, protection: Protection) -> dict[str, Any]:
    given = {"data": study.data(study.owner, "train").name, "head": study.head(study.owner).name}
    entry: dict[str, Any] = {"name": protection.name, "method": protection.method}
    entry |= {"settings": dict(protection.settings), **{name: given[name] for name in protection.reads}}
    if protection.siblings:
        entry["siblings"] = [study.expert(task).name for task in study.siblings[: protection.siblings]]
    return entry


def divide_test(study: Study, task: str) -> None:
    """Cut the test part into what the judge scores and what an attacker has labels for."""
    whole = study.data(task, "test")
    judged, learnt = (divided(study, task, who) for who in ("judge", "attacker"))
    if whole.suffix == ".npz":
        with np.load(whole) as arrays:
            np.savez(judged, **{name: rows[:-ATTACKERS] for name, rows in arrays.items()})
            np.savez(learnt, **{name: rows[-ATTACKERS:] for name, rows in arrays.items()})
    else:
        lines = whole.read_text().splitlines(keepends=True)
        judged.write_text("".join(lines[:-ATTACKERS]))
        learnt.write_text("".join(lines[-ATTACKERS:]))


def divided(study: Study, task: str, who: str) -> Path:
    """File of a share of the test part."""
    return study.folder / f"{task}-{who}.{study.suffix}"


def _task(study: Study, task: str, examples: tuple[int, int]) -> dict[str, Any]:
    files = {
        "train": divided(study, task, "attacker"),
        "validation": study.data(task, "validation"),
        "test": divided(study, task, "judge"),
    }
    parts = {part: file.name for part, file in files.items()}
    return {
        "name": task,
        **parts,
        "head": study.head(task).name,
        "examples": dict(zip(("validation", "test"), examples, strict=True)),
        "batch_size": 50,
    }


def main() -> None:
    """Prepare, audit, keep what is small."""
    parser = parser_of(__doc__)
    parser.add_argument("--study", choices=STUDIES, default="text")
    parser.add_argument("--tiers", default="T0,T1,T2")
    parser.add_argument("--examples", type=int, nargs=2, default=(200, 250), metavar=("VALIDATION", "TEST"))
    arguments = parser.parse_args()
    study = STUDIES[arguments.study](arguments.scratch)
    prepare(study)
    audited = plan(study, arguments.tiers.split(","), tuple(arguments.examples))
    made_from = {"tasks": [study.owner, study.rider], "siblings": list(study.siblings), "seed": 0}
    audit_study(audited, study.folder, prepared=made_from, workers=arguments.workers, out=arguments.out)


if __name__ == "__main__":
    main()
