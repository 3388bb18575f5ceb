"""In which order the merges of an audit race, so that each knows the best that its attacker has otherwise.

    1. without the victim: few, and at every attacker's hand; all of them meet every example
    2. a first look at the merges of every model, where merging is cheap: one batch of examples
    3. of each model, each free-rider and each threat model the merge that then looks best
    4. all others, with those as rivals

Jobs of one step know nothing of each other, so nothing depends on the number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unmergeable.evaluation.cells import Cell, Credits
from unmergeable.evaluation.judge import Job
from unmergeable.evaluation.plans.audit_plan import Grid
from unmergeable.evaluation.race import Rules, mean_credits
from unmergeable.evaluation.run import Run
from unmergeable.evaluation.search import Found, Place, glance, merges_cheaply, merit, most_points, search
from unmergeable.evaluation.selection import BARS, skill_to_keep
from unmergeable.evaluation.threat_models import ThreatModel
from unmergeable.pools.pool import Call


@dataclass(frozen=True)
class Heats:
    """The searches of an audit.

    Attributes:
        run, grid, jobs: what is searched.
        doubt: of the races (:class:`unmergeable.evaluation.race.Rules`).
        alone: credits of each free-rider's own model on its task, by its name.
        known: what was found of some of the jobs before, by their numbers.
    """

    run: Run
    grid: Grid
    doubt: float
    jobs: Sequence[Job]
    alone: Mapping[str, Credits]
    known: Mapping[int, Found] = field(default_factory=dict)

    def searched(self) -> list[Found]:
        """What the search of each job found, in their order."""
        numbers = range(len(self.jobs))
        found = dict(self.known)
        first = [number for number in numbers if self.jobs[number].variant is None and number not in found]
        self._search("searching without the expert", first, found)
        leading = self._leading([number for number in numbers if number not in found])
        self._search("searching the most promising merges", leading, found)
        self._search("searching merges", [number for number in numbers if number not in found], found)
        return [found[number] for number in numbers]

    def rules(self, job: Job, found: Mapping[int, Found], model: ThreatModel) -> Rules:
        """Of the race of a job, or of training after it.

        Args:
            job: whose attacks race.
            found: by job, what their rivals are among.
            model: of the weakest attacker who can do it; a rival is what that one has as well.
        """
        defended, rider = (task.entry.name for task in job.group.tasks)
        others = [
            number
            for number, other in enumerate(self.jobs)
            if other.rider == job.rider
            and other.owner in (None, job.owner)
            and model.may(other.threat_model, with_victim=other.owner is not None)
        ]
        rivals = [cell for number in others if number in found for cell in found[number].cells.values()]
        possible = sum(most_points(self.jobs[number].group, self.grid) for number in others)
        return Rules(defended, rider, self.alone[job.rider.name], tuple(rivals), possible, self.doubt, BARS)

    def _search(self, stage: str, numbers: Sequence[int], found: dict[int, Found]) -> None:
        calls: list[Call] = [
            (search, (job.group, self.grid, self._kept(job), rules, self.run.cells))
            for job in (self.jobs[number] for number in numbers)
            for rules in [None if job.variant is None else self.rules(job, found, job.threat_model)]
        ]
        if calls:
            found |= dict(zip(numbers, self.run.done(stage, calls, "merges"), strict=True))

    def _leading(self, numbers: Sequence[int]) -> list[int]:
        """The most promising job of each attacker on each model."""
        groups: dict[Any, list[int]] = {}
        for number in numbers:
            job = self.jobs[number]
            groups.setdefault((job.rider.name, job.owner, job.threat_model), []).append(number)
        looked_at = [
            number
            for group in groups.values()
            if len(group) > 1
            for number in group
            if merges_cheaply(self.jobs[number].group)
        ]
        calls: list[Call] = [(glance, (self.jobs[number].group, self.grid, self.run.cells)) for number in looked_at]
        seen = dict(
            zip(looked_at, self.run.done("a first look at merges", calls, "merges") if calls else (), strict=True)
        )
        return [max(group, key=lambda number: self._promise(number, seen.get(number, {}))) for group in groups.values()]

    def _promise(self, number: int, cells: Mapping[Place, Cell]) -> tuple[bool, float]:
        job = self.jobs[number]
        defended, rider = (task.entry.name for task in job.group.tasks)
        merits = (merit(mean_credits(cell, defended, rider), self._kept(job)) for cell in cells.values())
        return max(merits, default=(False, -1.0))

    def _kept(self, job: Job) -> float:
        return skill_to_keep(float(self.alone[job.rider.name].mean()))
