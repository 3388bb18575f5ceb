"""The page of an audit: one HTML file that says what each protection is worth, and shows where that comes from.

It is made from ``audit.json`` alone, so it can be made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unmergeable.checkpoint.disk import replace_file
from unmergeable.claims import HINDERS, STOPS
from unmergeable.evaluation.report.access import efforts
from unmergeable.evaluation.report.commands import attack_commands
from unmergeable.evaluation.report.pictures import Looks, front_picture, line_pictures, number, percent, shown
from unmergeable.evaluation.report.verdict import (
    JUDGEMENTS,
    MORE_EXAMPLES,
    against,
    attack,
    caveats,
    failed_controls,
    judgement,
    model_card,
    undecided_controls,
    verdict,
)
from unmergeable.evaluation.report.without_expert import UNKNOWN
from unmergeable.evaluation.results import EXCESS, AuditResult, ProtectionResult, Refusal, points, read_audit, star
from unmergeable.evaluation.threat_models import ThreatModel
from unmergeable.page import render

PAGE = "report.html"

TONES = dict(zip(JUDGEMENTS, ("good", "", "bad", "bad", ""), strict=True))
"""The class of a judgement on the page; the words say the same."""


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write the page of an audit into its folder, beside the result it is made from.

    Raises:
        BadInput: there is no result.
        UsageError: jinja2 or matplotlib is not installed.
        CheckpointError: the page cannot be written.
    """
    page = Path(folder) / PAGE
    replace_file(page, render_report(read_audit(Path(folder))).encode())
    return page


def render_report(result: AuditResult) -> str:
    entries = result.audited
    judgements = {name: {t: judgement(entry) for t, entry in e.tiers.items()} for name, e in entries.items()}
    return render(
        "evaluation/report/page.html.j2",
        result=result,
        entries=entries,
        verdicts={name: verdict(name, protection) for name, protection in entries.items()},
        judgements=judgements,
        tones=TONES,
        worst={
            name: _worst_tone(said for model, said in judged.items() if model is not ThreatModel.RETRAIN)
            for name, judged in judgements.items()
        },
        excesses=_excesses(result),
        excess_head=EXCESS,
        efforts=efforts,
        stars={name: {t: star(entry.worst) for t, entry in e.tiers.items()} for name, e in entries.items()},
        stops=STOPS,
        hinders=HINDERS,
        caveats={name: caveats(protection) for name, protection in entries.items()},
        attack=attack,
        heads=[against(model) for model in result.threat_models],
        is_without_data=not any(model.trains for model in result.threat_models),
        unknown="" if result.has_expert else UNKNOWN,
        failed="" if result.passed else failed_controls(result),
        undecided=undecided_controls(result),
        more_examples=MORE_EXAMPLES,
        heat_maps=_heat_maps(result.protections),
        refused=_refusals(result.refused),
        fronts=[front_picture(name, front) for name, entry in entries.items() for front in entry.fronts],
        lines=line_pictures(result),
        looks=Looks(result.analyses) if result.analyses and result.analyses.models else None,
        by_hand=_by_hand(result),
        card=model_card(result),
        plan=json.dumps(result.plan, indent=2, ensure_ascii=False),
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


def _heat_maps(protections: Mapping[str, ProtectionResult]) -> list[HeatMap]:
    """One heat map per merge. Colour is the share of the victim's skill recovered: none without the expert."""
    stolen = {
        (cell.merge, name, cell.recovery): cell.score
        for name, protection in protections.items()
        for cell in protection.matrix
    }
    scores = [score for score in stolen.values() if score is not None]
    worst = [stolen.worst for protection in protections.values() for stolen in protection.tiers.values()]
    least = min((trial.without_victim for trial in worst if trial is not None), default=0.0)
    span = max(scores, default=1.0) - least

    def inked(score: float | None) -> tuple[float | None, float]:
        return score, 0.0 if score is None or span <= 0 else min(1.0, max(0.0, (score - least) / span))

    recoveries = list(dict.fromkeys(recovery for _, _, recovery in stolen))

    def row(merge: str, name: str) -> tuple[tuple[float | None, float], ...]:
        return tuple(inked(stolen.get((merge, name, recovery))) for recovery in recoveries)

    return [
        HeatMap(
            merge,
            tuple(recovery or "none" for recovery in recoveries),
            {name: row(merge, name) for name in protections},
        )
        for merge in dict.fromkeys(merge for merge, _, _ in stolen)
    ]


def _excesses(result: AuditResult) -> dict[str, str]:
    """By protection; empty where the plan did not ask for any."""
    if all(protection.excess is None for protection in result.protections.values()):
        return {}
    return {name: points(protection.worst_excess) for name, protection in result.protections.items()}


def _worst_tone(judgements: Iterable[str]) -> str:
    """Of several judgements the worst, as the page colours it."""
    tones = {TONES[judgement] for judgement in judgements}
    return next((tone for tone in ("bad", "", "good") if tone in tones), "")


def _refusals(refused: Sequence[Refusal]) -> list[str]:
    """What could not be done and why; what was refused for one reason stands together."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for item in refused:
        name = shown(item.protection) if item.protection else "what is there without the expert"
        steps = ("training" if item.samples else None, item.merge, item.recovery)
        done = " after ".join(step for step in steps if step)
        names = by_reason.setdefault(item.reason, {}).setdefault(done, [])
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


def _by_hand(result: AuditResult) -> dict[str, list[str]]:
    """The commands of the best attack on each protection, by the attacker who knows most."""
    commands = {}
    for name, entry in result.audited.items():
        found = [verdicts for model, verdicts in entry.tiers.items() if model.merges] or list(entry.tiers.values())
        worst = found[-1].worst
        if worst is not None and worst.best and "protect" in result.plan:
            commands[name] = attack_commands(result.plan, name, worst)
    return {name: lines for name, lines in commands.items() if lines}
