"""What can be said of a release by somebody who has not the unprotected expert: what attackers get, and from what."""

from __future__ import annotations

from unmergeable.evaluation.results import ProtectionResult, Trial

UNKNOWN = (
    "D* is unknown: it is a share of what the unprotected expert adds to a merge, and nobody gave that expert; with it "
    "(--expert, or protect.expert in the plan) there are D*, its interval and the controls."
)


def described(name: str, protection: ProtectionResult) -> str:
    """What the release scores alone, and the best that each attacker gets with it and without it."""
    found = [(model, verdicts.worst) for model, verdicts in protection.tiers.items()]
    clauses = [f"{model.phrase} ({model}{_labels(worst)}) {_got(worst)}" for model, worst in found if worst is not None]
    return f"{name} scores {protection.utility.protected:.0%} alone. With it {'; '.join(clauses)}."


def _labels(trial: Trial) -> str:
    return f", {trial.samples} labelled" if trial.samples else ""


def _got(trial: Trial) -> str:
    if not trial.attacks_tried:
        return f"can merge nothing, and has {trial.without_victim:.0%} without it"
    return f"gets {trial.protected:.0%}, against {trial.without_victim:.0%} without it"
