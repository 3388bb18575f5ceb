"""Which attacks need a test: those that some attacker may pick from all that it has, and the best of each merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unmergeable.evaluation.cells import Credits
from unmergeable.evaluation.judge import Job
from unmergeable.evaluation.scoring import Coefficients
from unmergeable.evaluation.search import Found
from unmergeable.evaluation.selection import Menu, choice
from unmergeable.evaluation.threat_models import ThreatModel
from unmergeable.evaluation.worst_case import contenders


@dataclass(frozen=True)
class Searched:
    """A job and what was found on validation examples."""

    job: Job
    found: Found


@dataclass(frozen=True)
class _Choices:
    """The attacks of some jobs that met every validation example: the number of the job, and the point, of each."""

    places: Sequence[tuple[int, Coefficients | None]]
    menu: Menu

    @classmethod
    def of(cls, searched: Sequence[Searched], numbers: Sequence[int]) -> _Choices | None:
        """Of jobs for one free-rider; None where there is none."""
        places = [(number, point) for number in numbers for point in searched[number].found.cells]
        if not places:
            return None
        defended, rider = (task.entry.name for task in searched[places[0][0]].job.group.tasks)
        cells = [(searched[number].found.cells[point], None) for number, point in places]
        return cls(places, Menu.of(cells, defended, rider))


def points_to_test(
    searched: Sequence[Searched], models: Sequence[ThreatModel], alone: Mapping[str, Credits]
) -> list[list[Coefficients | None]]:
    """The points of each job that need a test; without the victim all of them do.

    Args:
        searched: all jobs.
        models: the attackers.
        alone: credits of each free-rider's own model on validation examples of its task, by its name.
    """
    wanted: list[dict[Coefficients | None, None]] = [{} for _ in searched]
    for rider, credited in alone.items():
        numbers = [number for number, done in enumerate(searched) if done.job.rider.name == rider]
        without = _Choices.of(searched, [number for number in numbers if searched[number].job.owner is None])
        assert without is not None, "the free-rider's own model is always there"
        for number, point in without.places:
            wanted[number][point] = None
        for open_to in _menus(searched, numbers, models):
            choices = _Choices.of(searched, open_to)
            if choices is None:
                continue
            for place in contenders(choices.menu, without.menu, credited):
                number, point = choices.places[place]
                wanted[number][point] = None
        for number in numbers:
            choices = _Choices.of(searched, [number])
            if choices is not None and (best := _best(choices.menu, credited)) is not None:
                wanted[number][choices.places[best][1]] = None
    return [list(points) for points in wanted]


def _menus(searched: Sequence[Searched], numbers: Sequence[int], models: Sequence[ThreatModel]) -> list[list[int]]:
    """The jobs that are open to each attacker on each model."""
    owners = dict.fromkeys(owner for number in numbers if (owner := searched[number].job.owner) is not None)
    return [
        [
            number
            for number in numbers
            if searched[number].job.owner == owner and model.includes(searched[number].job.threat_model)
        ]
        for owner in owners
        for model in models
    ]


def _best(menu: Menu, rider_alone: Credits) -> int | None:
    return choice(menu.defended.mean(axis=1), menu.rider.mean(axis=1), float(rider_alone.mean()))
