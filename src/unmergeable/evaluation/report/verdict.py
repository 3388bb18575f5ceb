"""What an audit says of a protection, in sentences: for the terminal, for a model card, for the top of the page."""

from __future__ import annotations

import re
from itertools import groupby

from unmergeable import claims
from unmergeable.claims import DStar
from unmergeable.evaluation.flags import DOUBTS, FLAGS
from unmergeable.evaluation.report.access import beyond_merging
from unmergeable.evaluation.report.without_expert import UNKNOWN, described
from unmergeable.evaluation.results import AttackRecord, AuditResult, ProtectionResult, Trial, Verdicts, star
from unmergeable.evaluation.threat_models import ThreatModel

CANNOT_BE_JUDGED = "cannot be judged"

JUDGEMENTS = (*claims.JUDGEMENTS[:-1], CANNOT_BE_JUDGED)
"""What can be said of a protection and an attacker; the third is where D* is high and its interval reaches too low."""

_MEANING = (
    "D* is 0 where the best attack found gets as much of the skill as from the unprotected model, 1 where it gets "
    "no more than without it. Worst case over the attacks that were tried; others may do better."
)


def judgement(verdicts: Verdicts) -> str:
    """One of :data:`JUDGEMENTS`, as :class:`unmergeable.claims.DStar` has it.

    What nobody could attack is not judged: a model that does not merge may be rewritten, or learnt from.
    """
    worst = verdicts.worst
    if worst is None or worst.is_denominator_small or "uncertain_denominator" in worst.flags:
        return CANNOT_BE_JUDGED
    if not _is_mergeable(verdicts):
        return CANNOT_BE_JUDGED
    said = DStar(worst.d_star, *worst.interval, DOUBTS.isdisjoint(worst.flags)).judgement
    return said if said in JUDGEMENTS else CANNOT_BE_JUDGED


def verdict(name: str, protection: ProtectionResult) -> str:
    """What one protection costs, and in one sentence whom it stops and whom it does not.

    Attackers next to each other who are judged alike are represented by one: the strongest of those who are stopped,
    the weakest of those who are not. The scores at the end are those of the last who is named. Sentences about those
    who merge nothing come after.
    """
    if protection.utility.loss is None:
        return described(name, protection)
    loss = 100 * protection.utility.loss
    cost = "costs nothing that was measured" if loss <= 0.05 else f"costs {loss:.1f} points on its own task"
    sentence, before, scores = "", "", ""
    merging = [entry for entry in protection.tiers.items() if entry[0].merges]
    for judged, alike in groupby(merging, key=lambda entry: judgement(entry[1])):
        group = list(alike)
        model, verdicts = group[-1] if judged in ("stops", "hinders") else group[0]
        if judged == CANNOT_BE_JUDGED:
            reason = _inconclusive(verdicts)
            clause = f"inconclusive against {model.phrase} ({model}): {reason}"
        else:
            clause = f"it {judged} {model.phrase} ({model}: {_details(verdicts)})"
            scores = f": {_scores(verdicts)}"
        joint = ", but " if before in ("stops", "hinders") else ", and "
        sentence += f"{joint if before else ''}{clause}"
        before = judged
    said = [f"{sentence[:1].upper()}{sentence[1:]}{'' if before == CANNOT_BE_JUDGED else scores}."] if merging else []
    return " ".join([f"{name} {cost}.", *said, *beyond_merging(protection)])


def _inconclusive(verdicts: Verdicts) -> str:
    worst = verdicts.worst
    if worst is not None and not worst.is_denominator_small and _is_mergeable(verdicts):
        return FLAGS["uncertain_denominator"]
    if worst is not None and not _is_mergeable(verdicts):
        return "no merge with it is possible, and nothing else was tried"
    return "the unprotected expert improves the merge by less than 5 points"


def caveats(protection: ProtectionResult) -> list[str]:
    """What is to be held against the figures of a protection: a line for each flag, with the attackers it concerns."""
    lines = []
    for flag, meaning in FLAGS.items():
        models = [
            str(model)
            for model, verdicts in protection.tiers.items()
            if verdicts.worst is not None and flag in verdicts.worst.flags
        ]
        if models:
            lines.append(f"{', '.join(models)}: {meaning}.")
    return lines


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
    if best.uses_victim:
        done = [best.recovery, _merging(best) if best.merge else "the release itself"]
    else:
        done = [f"leave the expert alone{f', start from {best.start}' if best.start else ''}"]
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
    if undecided := undecided_controls(result):
        lines.append(f"UNDECIDED: {undecided}. Nobody is said to be stopped; {MORE_EXAMPLES}.")
    if not result.has_expert:
        lines.append(UNKNOWN)
    for name, protection in result.audited.items():
        lines += [verdict(name, protection), *(f"  {line}" for line in caveats(protection))]
    return lines


def model_card(result: AuditResult) -> str:
    """The audit as a block of Markdown for a model card."""
    table = result.table
    heads = [*table.columns[:2], *map(against, result.threat_models), *table.columns[2 + len(result.threat_models) :]]
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    rows += [f"| {' | '.join(map(as_markdown, row))} |" for row in table.rows]
    note = _MEANING if result.has_expert else UNKNOWN
    invalid = [] if result.passed else ["", f"**Invalid audit:** {as_markdown(failed_controls(result))}."]
    return "\n".join([*rows, *invalid, "", note]) + "\n"


def as_markdown(text: str) -> str:
    """A text that stands in a cell of a table as it is, on one line: names may be anybody's."""
    return re.sub(r"[\\`|<>\[\]*&]", r"\\\g<0>", " ".join(text.split()))


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


MORE_EXAMPLES = "give more examples of both tasks to learn more"


def undecided_controls(result: AuditResult) -> str:
    """Which controls are beyond their bounds, and may be so by luck."""
    return "; ".join(
        f"control {control.name} is {control.value:.2f}, allowed {control.bound}, and with so few examples may be luck"
        for control in result.controls
        if control.undecided
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
