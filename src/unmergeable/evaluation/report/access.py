"""What an audit says of attackers who merge nothing: who only runs a release, and who trains it on."""

from __future__ import annotations

from collections.abc import Iterator

from unmergeable.evaluation.results import AttackRecord, Excess, ProtectionResult, Trial
from unmergeable.evaluation.threat_models import ThreatModel


def beyond_merging(protection: ProtectionResult) -> Iterator[str]:
    """Sentences about the attackers whom a protection against merging need not stop, as far as they attacked."""
    tiers = protection.tiers
    if ThreatModel.BLACK_BOX in tiers:
        worst = tiers[ThreatModel.BLACK_BOX].worst
        yield "Nothing is known of who only runs it (black_box)." if worst is None else _running(worst)
        if protection.worst_excess is not None:
            yield _weights(protection.worst_excess)
    if ThreatModel.RETRAIN in tiers:
        worst = tiers[ThreatModel.RETRAIN].worst
        yield "Nothing is known of who trains it on (retrain)." if worst is None else _retraining(worst)


def effort(best: AttackRecord) -> str:
    """Steps, examples and time of an attack that trains; empty for others."""
    if best.steps is None:
        return ""
    read = "" if best.examples is None else f" on at most {best.examples} examples"
    return f"{best.steps} steps{read}, {best.cpu_seconds:.1f} CPU seconds"


def efforts(trial: Trial) -> str:
    """That of the best attack; of one that trains a release also that of the same training without the victim."""
    best, without = (trial.best.get(label) for label in ("protected", "without_victim"))
    said = [] if best is None else [effort(best)]
    if without is not None and without.start:
        said.append(f"without the expert, trained equally from {without.start}: {effort(without)}")
    return "; ".join(text for text in said if text)


def _running(worst: Trial) -> str:
    spent = effort(worst.best["protected"]) if "protected" in worst.best else ""
    return (
        f"Whoever only runs it (black_box) gets {_percent(worst.protected)} by a student of its answers, against "
        f"{_percent(worst.without_victim)} without the expert{f' ({spent})' if spent else ''}."
    )


def _weights(excess: Excess) -> str:
    low, high = (100 * value for value in excess.interval)
    interval = f"95 % interval {low:.1f} to {high:.1f}"
    if excess.value <= 0:
        return f"Its weights give no more than that ({100 * excess.value:+.1f} points, {interval})."
    return f"Its weights give {100 * excess.value:.1f} points more than that ({interval})."


def _retraining(worst: Trial) -> str:
    release, without = (worst.best.get(label) for label in ("protected", "without_victim"))
    spent = [f" ({text})" if best is not None and (text := effort(best)) else "" for best in (release, without)]
    start = f" from {without.start}" if without is not None and without.start else ""
    return (
        f"Training it on for another task, with {worst.samples} labelled examples so that it forgets nothing "
        f"(retrain), is no merge and probably cannot be stopped: that gets {_percent(worst.protected)}{spent[0]}, and "
        f"the same training without the expert{start} {_percent(worst.without_victim)}{spent[1]}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
