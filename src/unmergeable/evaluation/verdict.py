"""What an audit found, in sentences: for the terminal, for a model card, for the top of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from unmergeable.evaluation.models import IDENTITY, SCALE

TIERS = {
    "T0": "ordinary merging",
    "T1": "an attacker who knows base and method, without data",
    "T2": "an attacker who has labelled examples as well",
    "T3": "an attacker who has unlabelled examples besides",
}
"""What the attacker of a tier is called in sentences."""

STOPS, HINDERS = 0.8, 0.2
"""D* from which a protection is said to stop an attacker, and to hinder one. The whole interval must lie above."""

JUDGEMENTS = ("stops", "hinders", "is not shown to stop", "does not stop", "cannot be judged")
"""What can be said of a protection and an attacker; the third is where D* is high and its interval reaches too low."""


def judgement(tier: Mapping[str, Any]) -> str:
    """One of :data:`JUDGEMENTS`, from the lower end of the interval: what may be luck is not called protection."""
    worst = tier["worst"]
    if worst is None or worst["is_denominator_small"]:
        return "cannot be judged"
    low = worst["interval"][0]
    if low is not None and low >= STOPS:
        return "stops"
    if low is not None and low >= HINDERS:
        return "hinders"
    return "is not shown to stop" if worst["d_star"] is not None and worst["d_star"] >= HINDERS else "does not stop"


def verdict(name: str, protection: Mapping[str, Any]) -> str:
    """What one protection costs, and in one sentence whom it stops and whom it does not.

    Attackers of neighbouring tiers who are judged alike stand for one another: the strongest of those who are stopped,
    the weakest of those who are not. The scores at the end are those of the last who is named.
    """
    loss = 100 * protection["utility"]["loss"]
    cost = "costs nothing that was measured" if loss <= 0.05 else f"costs {loss:.1f} points on its own task"
    sentence, before, scores = "", "", ""
    for found, alike in groupby(protection["tiers"].items(), key=lambda entry: judgement(entry[1])):
        group = list(alike)
        tier, entry = group[-1] if found in ("stops", "hinders") else group[0]
        if found == "cannot be judged":
            clause = f"nothing can be said about {TIERS[tier]}, for the expert adds too little to a merge as it is"
        else:
            clause = f"it {found} {TIERS[tier]} ({_details(entry)})"
            scores = f": {_scores(entry)}"
        joint = ", but " if before in ("stops", "hinders") else ", and "
        sentence += f"{joint if before else ''}{clause}"
        before = found
    return f"{name} {cost}. {sentence[:1].upper()}{sentence[1:]}{'' if before == 'cannot be judged' else scores}."


def _details(tier: Mapping[str, Any]) -> str:
    samples = tier["worst"].get("samples")
    given = [f"{samples} labelled"] if samples else []
    if not _is_mergeable(tier):
        given.append("no merge with it is possible")
    return ", ".join([*given, f"D* = {star(tier['worst'])}"])


def _scores(tier: Mapping[str, Any]) -> str:
    worst = tier["worst"]
    got = f"{'the best merge gets' if _is_mergeable(tier) else 'what is left gets'} {_percent(worst['protected'])}"
    return (
        f"{got}, against {_percent(worst['unprotected'])} unprotected and {_percent(worst['without_victim'])} without "
        "the expert"
    )


def _is_mergeable(tier: Mapping[str, Any]) -> bool:
    """Whether any attack with the protected expert could be tried at all."""
    return any(trial["attacks_tried"] for trial in tier["trials"])


def star(worst: Mapping[str, Any] | None) -> str:
    """D* with its interval."""
    if worst is None or worst["d_star"] is None:
        return "–"
    low, high = worst["interval"]
    return f"{worst['d_star']:.2f}, 95 % interval {low:.2f} to {high:.2f}"


def attack(best: Mapping[str, Any]) -> str:
    """What the attacker did."""
    done = [best["recovery"], _merging(best)] if best["uses_victim"] else ["leave the expert alone"]
    if best.get("samples"):
        done.append(f"training on {best['samples']} examples at rate {short(best['learning_rate'])}")
    return ", then ".join(step for step in done if step is not None)


def short(value: float) -> str:
    """A number that may be small: 3e-6, not 3e-06."""
    return f"{value:g}".replace("e-0", "e-")


def _merging(best: Mapping[str, Any]) -> str:
    if best["coefficients"] is None:
        return str(best["merge"])
    return f"{best['merge']} with " + " and ".join(f"{value:g}" for value in best["coefficients"])


def summary(document: Mapping[str, Any]) -> list[str]:
    """The audit for a terminal."""
    lines = [] if document["passed"] else [f"INVALID: {failed_controls(document)}. The figures below mean nothing."]
    lines += [verdict(name, found) for name, found in protections(document).items()]
    return lines


def model_card(document: Mapping[str, Any]) -> str:
    """The audit as a block of Markdown for a model card."""
    tiers = list(next(iter(protections(document).values()))["tiers"])
    rows = [
        "| protection | points lost alone | " + " | ".join(f"D* against {TIERS[tier]}" for tier in tiers) + " |",
        "|---|---|" + "---|" * len(tiers),
    ]
    for name, found in protections(document).items():
        stars = " | ".join(star(found["tiers"][tier]["worst"]) for tier in tiers)
        rows.append(f"| {name} | {100 * found['utility']['loss']:.1f} | {stars} |")
    note = (
        "D* is 0 where the best attack found gets as much of the skill as from the unprotected model, 1 where it gets "
        "no more than without it. Worst case over the attacks that were tried; others may do better."
    )
    invalid = [] if document["passed"] else ["", f"**Invalid audit:** {failed_controls(document)}."]
    return "\n".join([*rows, *invalid, "", note]) + "\n"


def protections(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The protections of the plan, without the controls unless there is nothing else."""
    found: dict[str, Mapping[str, Any]] = dict(document["protections"])
    real = {name: entry for name, entry in found.items() if name not in (IDENTITY, SCALE)}
    return real or found


def failed_controls(document: Mapping[str, Any]) -> str:
    """Which controls failed, and by how much."""
    failed: Sequence[Mapping[str, Any]] = [control for control in document["controls"] if not control["passed"]]
    return "; ".join(
        f"control {control['name']} is {'unknown' if control['value'] is None else format(control['value'], '.2f')}, "
        f"allowed {control['bound']}"
        for control in failed
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
