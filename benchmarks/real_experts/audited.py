"""An audit of what a study made, and its results as they are kept beside the code."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.vision_audit import told, write_results

from unmergeable.auditing.report import write_report
from unmergeable.auditing.run import audit
from unmergeable.auditing.verdict import summary


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """What every audit is told: where to work, with how many workers, and where the result goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    return parser


def audit_study(plan: Path, *, prepared: Mapping[str, Any], workers: int | None, out: Path | None) -> None:
    """Run a plan's audit into the folder ``audit`` beside it, going on where it was, and keep what is small.

    Args:
        plan: the plan's file.
        prepared: how base and experts were made; the JSON says so under this name.
        workers: processes; None for as many as there are processors.
        out: the JSON to write, and Markdown beside it; None for none.
    """
    folder = plan.parent / "audit"
    document = audit(plan, out=folder, workers=workers, progress=told(time.monotonic()))
    print(*summary(document), write_report(folder), sep="\n")
    if out is not None:
        write_results({**without_places(document, plan.parent), "prepared": prepared}, out)


def without_places(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The result with paths as the plan has them: reasons name files, and where those lay is nobody's business."""
    found: dict[str, Any] = json.loads(json.dumps(document).replace(f"{folder}/", ""))
    return found
