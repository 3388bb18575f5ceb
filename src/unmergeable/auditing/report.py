"""The page of an audit: one HTML file that says what each protection is worth, and shows where that comes from.

It is made from ``audit.json`` alone, so it can be made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmergeable.auditing.models import IDENTITY, SCALE
from unmergeable.auditing.run import RESULT
from unmergeable.auditing.verdict import (
    TIERS,
    attack,
    failed_controls,
    judgement,
    model_card,
    protections,
    star,
    verdict,
)
from unmergeable.checkpoint.disk import replace_file
from unmergeable.errors import BadInput
from unmergeable.page import COLOURS, new_figure, plain, render, svg

PAGE = "report.html"


def read_audit(folder: Path) -> dict[str, Any]:
    """The result of an audit.

    Raises:
        BadInput: the folder holds none that is complete.
    """
    path = folder / RESULT
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["protections"], document["controls"]
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; run `unmergeable audit` to its end first.") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{path} is not the result of an audit; run `unmergeable audit` again.") from None
    found: dict[str, Any] = document
    return found


def write_report(folder: Path) -> Path:
    """Write the page beside the result it is made from.

    Raises:
        BadInput: there is no result.
        UsageError: jinja2 or matplotlib is not installed.
        CheckpointError: the page cannot be written.
    """
    page = folder / PAGE
    replace_file(page, render_report(read_audit(folder)).encode())
    return page


def render_report(document: Mapping[str, Any]) -> str:
    """The page as text."""
    entries = protections(document)
    riders = [front["rider"] for front in next(iter(entries.values()))["fronts"]]
    return render(
        "auditing/report.html.j2",
        document=document,
        entries=entries,
        verdicts={name: verdict(name, found) for name, found in entries.items()},
        judgements={name: {t: judgement(found) for t, found in e["tiers"].items()} for name, e in entries.items()},
        stars={name: {t: star(found["worst"]) for t, found in e["tiers"].items()} for name, e in entries.items()},
        attack=attack,
        tiers=TIERS,
        failed="" if document["passed"] else failed_controls(document),
        matrices={name: _heat_map(found) for name, found in document["protections"].items()},
        fronts={name: [(front, _front_picture(front)) for front in found["fronts"]] for name, found in entries.items()},
        lines={rider: (lines := _lines(document, rider), _line_picture(lines, document["task"])) for rider in riders},
        riders=riders,
        card=model_card(document),
        plan=json.dumps(document["plan"], indent=2, ensure_ascii=False),
    )


def _heat_map(found: Mapping[str, Any]) -> dict[str, Any]:
    """Recoveries down, merges across; each cell a score and the share of ink that shows it."""
    rows = list(dict.fromkeys(cell["recovery"] for cell in found["matrix"]))
    columns = list(dict.fromkeys(cell["merge"] for cell in found["matrix"]))
    cells = {(cell["recovery"], cell["merge"]): cell["score"] for cell in found["matrix"]}
    return {"rows": rows, "columns": columns, "cells": cells}


def _front_picture(front: Mapping[str, Any]) -> str:
    figure, axes = new_figure(6.4, 4.0)
    styles = {
        "unprotected": ("o", "-", COLOURS[0]),
        "protected": ("s", "--", COLOURS[1]),
        "without_victim": ("^", ":", "#7a7a7a"),
    }
    for label, (marker, style, colour) in styles.items():
        points = sorted(front[label], key=lambda point: point[1])
        axes.plot(
            [100 * rider for _, rider in points],
            [100 * defended for defended, _ in points],
            marker=marker,
            linestyle=style,
            color=colour,
            markersize=5,
            label=label.replace("_", " "),
        )
    axes.set_xlabel(f"task of {front['rider']}, per cent right")
    axes.set_ylabel("defended task, per cent right")
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    plain(axes)
    return svg(figure)


def _lines(document: Mapping[str, Any], rider: str) -> list[Mapping[str, Any]]:
    """Connectivity of the unprotected expert, and of each protected one, as released and recovered."""
    return [
        line
        for line in document["connectivity"]
        if line["rider"] == rider
        and (line["protection"] not in (IDENTITY, SCALE) or (line["protection"] == IDENTITY and not line["recovery"]))
    ]


def _line_picture(lines: Sequence[Mapping[str, Any]], task: str) -> str:
    figure, axes = new_figure(6.4, 4.0)
    for number, line in enumerate(lines):
        style = ("-", "--", ":", "-.")[number % 4]
        axes.plot(
            line["share"],
            [100 * (1 - s) for s in line["scores"][task]],
            linestyle=style,
            marker=".",
            label=_label(line),
        )
    axes.set_xlabel("share of the defended expert")
    axes.set_ylabel("defended task, per cent wrong")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plain(axes)
    return svg(figure)


def _label(line: Mapping[str, Any]) -> str:
    """What a line is called."""
    name = "unprotected" if line["protection"] == IDENTITY else line["protection"]
    return name if line["recovery"] is None else f"{name}, after {line['recovery']}"
