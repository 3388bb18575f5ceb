"""What the committed audits allow to be said of each protection: ``src/unmergeable/claims.json``, and tables of it.

    python -m benchmarks.claims

makes the file anew from ``benchmarks/results/*_audit.json``, and then every block of README.md and docs/ that is made
of it: what stands between ``<!-- claims: NAME -->`` and ``<!-- end of claims -->``. Run it after committing an audit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unmergeable.claims import EFFORT, THREAT_MODELS, DStar, Measurement, Study, limits, measured, measurements, overall
from unmergeable.defaults import RELEASE_SETTINGS, release_settings
from unmergeable.evaluation.flags import DOUBTS
from unmergeable.protections import PROTECTIONS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CLAIMS = ROOT / "src" / "unmergeable" / "claims.json"

DATE = "2026-11-28"
LATER = "2026-12-01"
RELEASE_SETTINGS_SINCE = "2026-12-01"

STUDIES = (
    Study("language_model_audit", "language_model", "SmolLM2-135M", 135_000_000, "question types", "spam", DATE),
    Study("vision_audit", "vision", "DINOv2-small", 22_000_000, "digits", "silhouettes of animals", DATE),
    Study("encoder_decoder_audit", "encoder_decoder", "a T5 (2M)", 2_000_000, "question types", "spam", DATE),
    Study("diffusion_audit", "diffusion", "a diffusion UNet (1M)", 1_000_000, "digits", "clothes", DATE),
    Study("text_audit", "text", "MiniLM", 22_000_000, "question types", "films, spam", LATER),
    Study(
        "vision_quick_audit",
        "vision",
        "DINOv2-small (two free-riders)",
        22_000_000,
        "digits",
        "animals, clothes",
        LATER,
    ),
)
"""The audits that claims rest on. The date is that of the commit."""

TIERS = dict(zip(("T0", "T1", "T2", "T3"), THREAT_MODELS, strict=True))
"""What the files of audits call the threat models of those who merge a release."""

_BLOCK = re.compile(r"(<!-- claims: (\w+)(?: (\w+))? -->\n).*?(<!-- end of claims -->)", re.DOTALL)


def claims_document() -> list[dict[str, Any]]:
    """The content of ``claims.json``, from the audits."""
    return [
        {
            "study": dataclasses.asdict(study),
            "protections": protections_of(
                json.loads((RESULTS / f"{study.name}.json").read_text(encoding="utf-8")), study.date
            ),
        }
        for study in STUDIES
    ]


def protections_of(audit: Mapping[str, Any], date: str = DATE) -> list[dict[str, Any]]:
    """What an audit found for each protection; ValueError if its own controls say that it is not to be trusted."""
    if not audit["passed"]:
        raise ValueError("a control of this audit failed: nothing can be claimed from it")
    is_first_look = str(audit["plan"].get("attacker", "")).startswith("quick")
    entries = []
    for planned in audit["plan"]["protect"]["methods"]:
        entry: dict[str, Any] = {"method": planned} if isinstance(planned, str) else planned
        method = entry["method"]
        found = audit["protections"][entry.get("name", method)]
        entries.append(
            {
                "method": method,
                "settings": distinguishing(method, settings_then(date, method, entry.get("settings", {}))),
                "utility_loss": round(100 * found["utility"]["loss"], 1),
                "d_star": {
                    TIERS[tier]: d_star(tried["worst"], is_first_look=is_first_look and tier != "T0")
                    for tier, tried in found["tiers"].items()
                    if tier in TIERS
                },
            }
        )
    return entries


def settings_then(date: str, method: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What ``given`` meant on a date: before RELEASE_SETTINGS_SINCE a method's name alone meant its own defaults."""
    return release_settings(method, given) if date >= RELEASE_SETTINGS_SINCE else given


def distinguishing(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make this another protection than the method's defaults are."""
    defaults = defaults_of_protections()[method]
    return {name: value for name, value in settings.items() if name not in EFFORT and value != defaults[name]}


@functools.cache
def defaults_of_protections() -> Mapping[str, Mapping[str, Any]]:
    """The settings of every protection with their own defaults."""
    return {name: {item.name: item.default for item in dataclasses.fields(PROTECTIONS[name])} for name in PROTECTIONS}


def d_star(worst: Mapping[str, Any] | None, *, is_first_look: bool = False) -> list[float | bool | None]:
    """D* and the ends of its interval, and False where it was not recognised, a control is undecided, or the
    attacker is one for a first look, who tries little of what somebody can who knows the method.

    Nothing where there was too little to steal for the figures to mean anything.
    """
    flags = () if worst is None else worst.get("flags", ())
    if worst is None or worst["is_denominator_small"] or "uncertain_denominator" in flags:
        return [None, None, None]
    found = [None if value is None else round(value, 6) for value in (worst["d_star"], *worst["interval"])]
    return found if DOUBTS.isdisjoint(flags) and not is_first_look else [*found, False]


def leaderboard() -> str:
    """Every protection, in Markdown: a table for each audited model."""
    return "\n".join(
        f"### {_title(study)}\n\n{study.kind.replace('_', ' ').capitalize()}, {study.parameters / 1e6:g} million "
        f"parameters. The owner's task: {study.victim_task}; the attacker's own: {study.attacker_task}. "
        f"Audited {study.date}.\n\n{ranking(study)}"
        for study in STUDIES
    )


def ranking(study: Study) -> str:
    """The protections of one audit, in Markdown, by the lower end of D* off the shelf."""
    rows = sorted(
        (row for row in measurements() if row.study.name == study.name),
        key=lambda row: -(row.d_star["off_the_shelf"].low or 0.0),
    )
    audited = [threat_model for threat_model in THREAT_MODELS if any(threat_model in row.d_star for row in rows)]
    return table(
        ["protection", *(f"D* `{threat_model}`" for threat_model in audited), "points lost"],
        ([_name(row), *(cell(row.d_star[name]) for name in audited), f"{row.utility_loss:.1f}"] for row in rows),
    )


def summary() -> str:
    """One row for each protection at its defaults, in Markdown: off the shelf by model, then the white box over all."""
    rows = []
    for method in _ranked():
        found = {row.study.name: row for row in measured(method)}
        white_box = [row.d_star["white_box"].value for row in found.values()]
        losses = [row.utility_loss for row in found.values()]
        rows.append(
            [
                f"`{method}`",
                *(
                    cell(found[study.name].d_star["off_the_shelf"] if study.name in found else None)
                    for study in STUDIES
                ),
                _span([value for value in white_box if value is not None], 2),
                _span(losses, 1),
            ]
        )
    return table(["protection", *map(_title, STUDIES), "white box, all models", "points lost"], rows)


def sentences() -> str:
    """What may be said of each protection, one row each, in Markdown."""
    rows = ([f"`{method}`", limits(method)] for method in _ranked())
    return table(["protection", "what the audits allow to be said of it"], rows)


def as_released() -> str:
    """What may be said of the methods in the form that ``protect`` takes, where audits had it, as paragraphs."""
    forms = ((method, settings) for method in _ranked() if (settings := RELEASE_SETTINGS.get(method)))
    audited = [
        (method, settings)
        for method, settings in forms
        if any(row.settings for row in measured(method, None, settings))
    ]
    return (
        "\n>\n".join(f"> {limits(method, None, settings)}" for method, settings in audited).replace("D*", "D\\*") + "\n"
    )


def stopped() -> str:
    """Which attackers are stopped, and by what, as a paragraph in Markdown."""
    return f"> {overall()}\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines).replace("D*", "D\\*") + "\n"


def cell(found: DStar | None) -> str:
    """D* with its interval; a dash where it was not measured."""
    if found is None:
        return "–"
    if found.value is None or found.low is None or found.high is None:
        return "too little to steal"
    shown = f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
    return f"**{shown}**" if found.judgement == "stops" else shown


def with_claims(page: str) -> str:
    """A page with its blocks made anew."""

    def block(match: re.Match[str]) -> str:
        name, about = match[2], match[3]
        if name == "limits":
            text = f"> {limits(about)}\n".replace("D*", "D\\*")
        elif name == "model":
            text = "\n".join(ranking(study) for study in STUDIES if study.kind == about)
        else:
            made = {
                "leaderboard": leaderboard,
                "summary": summary,
                "sentences": sentences,
                "overall": stopped,
                "released": as_released,
            }
            text = made[name]()
        return f"{match[1]}\n{text}\n{match[4]}"

    return _BLOCK.sub(block, page)


def pages() -> list[Path]:
    """The pages that have such blocks."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in every if _BLOCK.search(page.read_text(encoding="utf-8"))]


def main() -> None:
    CLAIMS.write_text(json.dumps(claims_document(), indent=1) + "\n", encoding="utf-8")
    measurements.cache_clear()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        page.write_text(with_claims(text), encoding="utf-8")


def _ranked() -> list[str]:
    """Every method, by the lowest end of D* off the shelf over all models at its defaults."""

    def withstood(method: str) -> tuple[float, int]:
        found = [row.d_star["off_the_shelf"].low or 0.0 for row in measured(method)]
        return min(found), len(found)

    return sorted(dict.fromkeys(row.method for row in measurements()), key=withstood, reverse=True)


def _title(study: Study) -> str:
    return study.model.removeprefix("a ").removeprefix("diffusion ")


def _name(row: Measurement) -> str:
    settings = ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.settings.items()
    )
    return f"`{row.method}`" + (f" `{settings}`" if settings else "")


def _span(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()
