"""What an audit says of a protection, in sentences: for the terminal, for a model card, for the top of the page."""

from __future__ import annotations

from itertools import groupby

from unmergeable.evaluation.report.without_expert import UNKNOWN, described
from unmergeable.evaluation.results import AttackRecord, AuditResult, ProtectionResult, Trial, Verdicts, star
from unmergeable.evaluation.threat_models import ThreatModel

STOPS, HINDERS = 0.8, 0.2
"""D* from which a protection is said to stop an attacker, and to hinder one. The whole interval must lie above."""

JUDGEMENTS = ("stops", "hinders", "is not shown to stop", "does not stop", "cannot be judged")
"""What can be said of a protection and an attacker; the third is where D* is high and its interval reaches too low."""

_MEANING = (
    "D* is 0 where the best attack found gets as much of the skill as from the unprotected model, 1 where it gets "
    "no more than without it. Worst case over the attacks that were tried; others may do better."
)


def judgement(verdicts: Verdicts) -> str:
    """One of :data:`JUDGEMENTS`, from the lower end of the interval: what may be luck is not called protection.

    Nor is what nobody could attack: a model that does not merge may be rewritten, or learnt from.
    """
    worst = verdicts.worst
    if worst is None or worst.d_star is None or worst.is_denominator_small or not _is_mergeable(verdicts):
        return "cannot be judged"
    low = worst.interval[0]
    if low is not None and low >= STOPS:
        return "stops"
    if low is not None and low >= HINDERS:
        return "hinders"
    return "is not shown to stop" if worst.d_star is not None and worst.d_star >= HINDERS else "does not stop"


def verdict(name: str, protection: ProtectionResult) -> str:
    """What one protection costs, and in one sentence whom it stops and whom it does not.

    Attackers next to each other who are judged alike are represented by one: the strongest of those who are stopped,
    the weakest of those who are not. The scores at the end are those of the last who is named.
    """
    if protection.utility.loss is None:
        return described(name, protection)
    loss = 100 * protection.utility.loss
    cost = "costs nothing that was measured" if loss <= 0.05 else f"costs {loss:.1f} points on its own task"
    sentence, before, scores = "", "", ""
    for judged, alike in groupby(protection.tiers.items(), key=lambda entry: judgement(entry[1])):
        group = list(alike)
        model, verdicts = group[-1] if judged in ("stops", "hinders") else group[0]
        if judged == "cannot be judged":
            reason = "the unprotected expert improves the merge by less than 5 points"
            if not _is_mergeable(verdicts):
                reason = "no merge with it is possible, and nothing else was tried"
            clause = f"inconclusive against {model.phrase} ({model}): {reason}"
        else:
            clause = f"it {judged} {model.phrase} ({model}: {_details(verdicts)})"
            scores = f": {_scores(verdicts)}"
        joint = ", but " if before in ("stops", "hinders") else ", and "
        sentence += f"{joint if before else ''}{clause}"
        before = judged
    return f"{name} {cost}. {sentence[:1].upper()}{sentence[1:]}{'' if before == 'cannot be judged' else scores}."


def _details(verdicts: Verdicts) -> str:
    worst = _worst(verdicts)
    given = [f"{worst.samples} labelled"] if worst.samples else []
    return ", ".join([*given, f"D* = {star(worst)}"])


def _scores(verdicts: Verdicts) -> str:
    worst = _worst(verdicts)
    assert worst.unprotected is not None
    protected, unprotected, without = map(_percent, (worst.protected, worst.unprotected, worst.without_victim))
    return f"the best merge gets {protected}, against {unprotected} unprotected and {without} without the expert"


def _worst(verdicts: Verdicts) -> Trial:
    assert verdicts.worst is not None
    return verdicts.worst


def _is_mergeable(verdicts: Verdicts) -> bool:
    """Whether any attack with the protected expert could be tried at all."""
    return any(trial.attacks_tried for trial in verdicts.trials)


def attack(best: AttackRecord) -> str:
    """What the attacker did."""
    done = [best.recovery, _merging(best)] if best.uses_victim else ["leave the expert alone"]
    if best.samples and best.learning_rate is not None:
        done.append(f"training on {best.samples} examples at rate {short(best.learning_rate)}")
    return ", then ".join(step for step in done if step is not None)


def short(value: float) -> str:
    """A number that may be small: 3e-6, not 3e-06."""
    return f"{value:g}".replace("e-0", "e-")


def _merging(best: AttackRecord) -> str:
    if best.coefficients is None:
        return str(best.merge)
    return f"{best.merge} with " + " and ".join(f"{value:g}" for value in best.coefficients)


def summary(result: AuditResult) -> list[str]:
    """The audit for a terminal."""
    lines = [] if result.passed else [f"INVALID: {failed_controls(result)}. The figures below mean nothing."]
    if not result.has_expert:
        lines.append(UNKNOWN)
    return lines + [verdict(name, protection) for name, protection in result.audited.items()]


def model_card(result: AuditResult) -> str:
    """The audit as a block of Markdown for a model card."""
    columns = " | ".join(against(model) for model in result.threat_models)
    rows = [f"| protection | points lost alone | {columns} |", "|---|---|" + "---|" * len(result.threat_models)]
    rows += [f"| {' | '.join(row)} |" for row in result.table.rows]
    note = _MEANING if result.has_expert else UNKNOWN
    invalid = [] if result.passed else ["", f"**Invalid audit:** {failed_controls(result)}."]
    return "\n".join([*rows, *invalid, "", note]) + "\n"


def against(model: ThreatModel) -> str:
    """The head of a column of D*."""
    return f"{model}: D* against {model.phrase}"


def failed_controls(result: AuditResult) -> str:
    """Which controls failed, and by how much."""
    return "; ".join(
        f"control {control.name} is {'unknown' if control.value is None else format(control.value, '.2f')}, "
        f"allowed {control.bound}"
        for control in result.controls
        if not control.passed
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
