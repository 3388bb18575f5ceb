"""An audit of what a study made, and its results as they are kept beside the code."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from unmergeable.evaluation.report import write_report
from unmergeable.evaluation.run import audit
from unmergeable.evaluation.verdict import model_card, summary
from unmergeable.progress import Progress


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """What every audit is told: where to work, with how many workers, and where the result goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    return parser


def audit_study(
    plan: Mapping[str, Any], study: Path, *, prepared: Mapping[str, Any], workers: int | None, out: Path | None
) -> None:
    """Write a plan, run its audit, going on where it was, and keep what is small.

    Args:
        plan: as in a plan's file, with paths that start in ``study``.
        study: folder of base, experts and data; gets ``plan.yaml`` and the folder ``audit``.
        prepared: how base and experts were made; the JSON says so under this name.
        workers: processes; None for as many as there are processors.
        out: the JSON to write, and Markdown beside it; None for none.
    """
    plan_file, folder = study / "plan.yaml", study / "audit"
    plan_file.write_text(yaml.safe_dump(dict(plan), sort_keys=False))
    document = audit(plan_file, out=folder, workers=workers, progress=told(time.monotonic()))
    print(*summary(document), write_report(folder), sep="\n")
    if out is not None:
        write_results({**without_places(document, study), "prepared": prepared}, out)


def without_places(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The result with paths as the plan has them: reasons name files, and where those lay is nobody's business."""
    found: dict[str, Any] = json.loads(json.dumps(document).replace(f"{folder}/", ""))
    return found


def told(began: float) -> Progress:
    """Prints the end of every stage."""

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        if done == total and stage not in ("writing", "verifying", "estimating"):
            print(f"{time.monotonic() - began:7.1f} s  {stage}: {total} {unit}", flush=True)

    return progress


def write_results(document: Mapping[str, Any], out: Path) -> None:
    """What is small enough to keep beside the code: the result without its cells, and the block for a model card."""
    kept = {name: value for name, value in document.items() if name != "cells"}
    out.write_text(json.dumps({**kept, "scored": len(document["cells"])}, indent=1) + "\n")
    out.with_suffix(".md").write_text(model_card(document))
