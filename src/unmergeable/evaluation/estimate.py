"""What an audit will do, counted from its plan: models, sets of weights, examples. Time depends on the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from unmergeable.evaluation.methods import merge_takes_coefficients
from unmergeable.evaluation.plans.audit_plan import AuditPlan
from unmergeable.evaluation.plans.entries import MergeEntry
from unmergeable.evaluation.report.without_expert import UNKNOWN
from unmergeable.evaluation.structure import difference
from unmergeable.evaluation.threat_models import ThreatModel


@dataclass(frozen=True)
class Estimate:
    """Numbers are at most those: what is refused costs nothing, and what is shared is done once.

    Attributes:
        has_expert: whether D* will be known.
        threat_models: who attacks.
        released: controls and what is or was protected, each a model.
        recovered: models that recoveries will make of these.
        weights: merges that will be scored on validation examples.
        examples: passes of one example through the network that these take.
        trainings: fine-tunes of merges on labelled examples.
        unmerged: releases that have not the structure of the base, each with what differs.
    """

    has_expert: bool
    threat_models: tuple[str, ...]
    released: int
    recovered: int
    weights: int
    examples: int
    trainings: int
    unmerged: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = [
            f"Attackers: {', '.join(self.threat_models)}.",
            f"At most {self.released} models to attack, {self.recovered} recoveries of them, {self.weights} merges "
            f"({self.examples:,} examples through the network) and {self.trainings} trainings.",
        ]
        lines += [
            f"{name} is not merged as it is, but may be after a recovery: {why}" for name, why in self.unmerged.items()
        ]
        return lines if self.has_expert else [*lines, UNKNOWN]


def estimate(plan: AuditPlan) -> Estimate:
    """Counted from a plan whose models are on this machine."""
    controls = 2 if plan.has_expert else 0
    released = controls + len(plan.protections) * len(plan.seeds) + len(plan.releases)
    recoveries = sum(plan.reaches(entry.threat_model) for entry in plan.recoveries)
    given = sum(release.recovered is not None and plan.reaches(ThreatModel.WHITE_BOX) for release in plan.releases)
    recovered = released * recoveries + given
    merges = [merge for merge in plan.merges if plan.reaches(merge.threat_model)]
    weights = (released + recovered) * sum(_points(plan, merge) for merge in merges)
    sizes = [
        plan.task(plan.defended_task).size("validation"),
        *(plan.task(r.task).size("validation") for r in plan.riders),
    ]
    starts = released + 1
    rates = sum(len(plan.few_shot.methods(samples)) for samples in plan.few_shot.samples)
    learners = sum(model.trains for model in plan.threat_models)
    differences = {release.name: difference(plan.base, release.checkpoint) for release in plan.releases}
    return Estimate(
        has_expert=plan.has_expert,
        threat_models=tuple(map(str, plan.threat_models)),
        released=released,
        recovered=recovered,
        weights=weights * len(plan.riders),
        examples=weights * sum(sizes[0] + size for size in sizes[1:]),
        trainings=learners and learners * len(plan.riders) * starts * plan.few_shot.starts * rates,
        unmerged={name: why for name, why in differences.items() if why},
    )


def _points(plan: AuditPlan, merge: MergeEntry) -> int:
    """Sets of coefficients that are tried with a merge at most."""
    if not merge_takes_coefficients(merge.method, merge.settings):
        return 1
    grid = plan.coefficients
    return len(grid.defended) * len(grid.rider) + grid.refinements
