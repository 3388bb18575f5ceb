"""The page of an audit: one HTML file that says what each protection is worth, and shows where that comes from.

It is made from ``audit.json`` alone, so it can be made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.disk import replace_file
from unmergeable.errors import BadInput
from unmergeable.evaluation.commands import attack_commands
from unmergeable.evaluation.pictures import Looks, front_picture, line_pictures, number, percent, shown
from unmergeable.evaluation.run import RESULT
from unmergeable.evaluation.verdict import (
    HINDERS,
    JUDGEMENTS,
    STOPS,
    TIERS,
    attack,
    failed_controls,
    judgement,
    model_card,
    protections,
    star,
    verdict,
)
from unmergeable.page import render

PAGE = "report.html"

TONES = dict(zip(JUDGEMENTS, ("good", "", "bad", "bad", ""), strict=True))
"""The class of a judgement on the page; the words say the same."""


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
    judgements = {name: {t: judgement(found) for t, found in e["tiers"].items()} for name, e in entries.items()}
    tiers = {tier: TIERS.get(tier, tier) for tier in next(iter(document["protections"].values()))["tiers"]}
    analyses = document.get("analyses")
    return render(
        "evaluation/report.html.j2",
        document=document,
        entries=entries,
        verdicts={name: verdict(name, found) for name, found in entries.items()},
        judgements=judgements,
        tones=TONES,
        worst={name: _worst_tone(found.values()) for name, found in judgements.items()},
        stars={name: {t: star(found["worst"]) for t, found in e["tiers"].items()} for name, e in entries.items()},
        stops=STOPS,
        hinders=HINDERS,
        attack=attack,
        named_tiers=tiers,
        is_without_data=set(tiers) <= {"T0", "T1"},
        failed="" if document["passed"] else failed_controls(document),
        heat_maps=_heat_maps(document["protections"]),
        refused=_refusals(document["refused"]),
        fronts=[front_picture(name, front) for name, found in entries.items() for front in found["fronts"]],
        lines=line_pictures(document),
        looks=Looks(analyses) if analyses and analyses["models"] else None,
        by_hand=_by_hand(document, entries),
        scored=document["scored"] if "scored" in document else len(document["cells"]),
        card=model_card(document),
        plan=json.dumps(document["plan"], indent=2, ensure_ascii=False),
        shown=shown,
        percent=percent,
        number=number,
    )


@dataclass(frozen=True)
class HeatMap:
    """``rows``: by protection and across the recoveries, a score, None where there is none, and its share of ink."""

    merge: str
    recoveries: tuple[str, ...]
    rows: Mapping[str, tuple[tuple[float | None, float], ...]]


def _heat_maps(protections: Mapping[str, Any]) -> list[HeatMap]:
    """One for each merge. The ink is that of the stolen skill: none for what can be had without the expert."""
    found = {
        (cell["merge"], name, cell["recovery"]): cell["score"]
        for name, protection in protections.items()
        for cell in protection["matrix"]
    }
    scores = [score for score in found.values() if score is not None]
    worst = [tier["worst"] for protection in protections.values() for tier in protection["tiers"].values()]
    least = min((trial["without_victim"] for trial in worst if trial is not None), default=0.0)
    span = max(scores, default=1.0) - least

    def inked(score: float | None) -> tuple[float | None, float]:
        return score, 0.0 if score is None or span <= 0 else min(1.0, max(0.0, (score - least) / span))

    recoveries = list(dict.fromkeys(recovery for _, _, recovery in found))
    return [
        HeatMap(
            merge,
            tuple(recovery or "none" for recovery in recoveries),
            {name: tuple(inked(found.get((merge, name, recovery))) for recovery in recoveries) for name in protections},
        )
        for merge in dict.fromkeys(merge for merge, _, _ in found)
    ]


def _worst_tone(judgements: Iterable[str]) -> str:
    """Of several judgements the worst, as the page colours it."""
    tones = {TONES[judgement] for judgement in judgements}
    return next((tone for tone in ("bad", "", "good") if tone in tones), "")


def _refusals(refused: Sequence[Mapping[str, Any]]) -> list[str]:
    """What could not be done and why; what was refused for one reason stands together."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for item in refused:
        name = shown(item["protection"]) if item["protection"] else "what is there without the expert"
        steps = ("training" if item.get("samples") else None, item.get("merge"), item.get("recovery"))
        done = " after ".join(step for step in steps if step)
        names = by_reason.setdefault(item["reason"], {}).setdefault(done, [])
        if name not in names:
            names.append(name)
    lines = []
    for reason, groups in by_reason.items():
        by_names: dict[str, list[str]] = {}
        for done, names in groups.items():
            by_names.setdefault(", ".join(names), []).append(done)
        what = "; ".join(f"{', '.join(done)} of {names}" for names, done in by_names.items())
        lines.append(f"{what}: {reason}")
    return lines


def _by_hand(document: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, list[str]]:
    """The commands of the best attack on each protection, by the attacker who knows most."""
    found = {}
    for name, entry in entries.items():
        worst = list(entry["tiers"].values())[-1]["worst"]
        if worst is not None and "best" in worst and "protect" in document["plan"]:
            found[name] = attack_commands(document["plan"], name, worst)
    return {name: commands for name, commands in found.items() if commands}
