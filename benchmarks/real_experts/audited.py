"""An audit of what a study made, and its result as it is kept beside the code.

    python -m benchmarks.real_experts.audited AUDIT STUDY --out benchmarks/results/vision_audit.json

AUDIT is the output directory of ``unmergeable audit``, STUDY the folder of the experts. Writes the result without its
cells as JSON, and the block for a model card beside it as Markdown.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from unmergeable.evaluation import AuditResult, audit, model_card, read_audit, summary, write_report
from unmergeable.progress import Progress

LONG = 1000
"""Sets of weights from which a result is written without spaces."""


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """What every audit is told: where to work, with how many workers, and where the result goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    return parser


def audit_study(
    plan: Mapping[str, Any],
    study: Path,
    *,
    prepared: Mapping[str, Any],
    workers: int | None,
    out: Path | None,
    name: str | None = None,
) -> None:
    """Write a plan, run its audit, going on where it was, and keep what is small.

    Args:
        plan: as in a plan's file, with paths that start in ``study``.
        study: folder of base, experts and data; gets ``plan.yaml`` and the folder ``audit``.
        prepared: how base and experts were made; the JSON says so under this name.
        workers: processes; None for as many as there are processors.
        out: the JSON to write, and Markdown beside it; None for none.
        name: of this audit, where a study has several; its plan and folder are called so too.
    """
    suffix = "" if name is None else f"-{name}"
    plan_file, folder = study / f"plan{suffix}.yaml", study / f"audit{suffix}"
    plan_file.write_text(yaml.safe_dump(dict(plan), sort_keys=False))
    result = audit(plan_file, out=folder, workers=workers, progress=told(time.monotonic()))
    print(*summary(result), write_report(folder), sep="\n")
    if out is not None:
        keep(result, study, prepared, out)


def told(began: float) -> Progress:
    """Prints the end of every stage."""

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        if done == total and stage not in ("writing", "verifying", "estimating", "ranges of hidden units"):
            print(f"{time.monotonic() - began:7.1f} s  {stage}: {total} {unit}", flush=True)

    return progress


def keep(result: AuditResult, study: Path, prepared: Mapping[str, Any], out: Path) -> None:
    """Write what is small enough to keep beside the code: a compact result, and a block for a model card.

    Reasons name files; they are written as the plan has them.
    """
    document = result.compact(prepared).to_json()
    is_long = len(result.cells or ()) > LONG
    text = json.dumps(document, indent=None if is_long else 1, separators=(",", ":") if is_long else None)
    out.write_text(text.replace(f"{study}/", "") + "\n")
    out.with_suffix(".md").write_text(model_card(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", type=Path)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    arguments = parser.parse_args()
    result = read_audit(arguments.audit)
    keep(result, arguments.study, {"tasks": [task["name"] for task in result.plan["tasks"]], "seed": 0}, arguments.out)


if __name__ == "__main__":
    main()
