"""In which stages an attacker tries merges: what does best in one is where the next begins.

    1. every recovery with the first merge, and every merge with the release as it is
    2. every other merge with the recovery that did best          attackers who combine the best
    3. coefficients for parts, from the best point of whole experts      attackers who look at parts

Without the victim there are the free-rider's own multiples, and every merge with the base. What is said of "the best"
holds for each free-rider, each released model and each threat model, so that every attacker goes on with the best that
it has, and the unprotected expert is attacked in the same stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from unmergeable.evaluation.attackers import Attacker
from unmergeable.evaluation.by_part import BY_PART
from unmergeable.evaluation.contending import Searched
from unmergeable.evaluation.judge import Job
from unmergeable.evaluation.models import Variant
from unmergeable.evaluation.plans.entries import MergeEntry
from unmergeable.evaluation.scoring import Coefficients
from unmergeable.evaluation.search import merit

_WHOLE = "task_arithmetic"


def first_merges(attacker: Attacker, variant: Variant, merges: Sequence[MergeEntry]) -> Sequence[MergeEntry]:
    """What a model is merged by in the first stage."""
    return merges if attacker.combines == "all" or variant.recovery is None else merges[:1]


def other_merges(
    searched: Sequence[Searched], merges: Sequence[MergeEntry], kept: Mapping[str, float]
) -> list[tuple[Job, MergeEntry]]:
    """The merges of the second stage, each with a job of the first on the same model.

    Args:
        searched: the first stage.
        merges: all that the attacker has.
        kept: the score that each free-rider must keep, by its name.
    """
    recovered = [done for done in searched if done.job.variant is not None and done.job.variant.recovery is not None]
    tried = {_key(done.job, merge) for done in recovered if (merge := done.job.merge) is not None}
    wanted: dict[Any, tuple[Job, MergeEntry]] = {}
    for group in _groups(recovered).values():
        best = max(group, key=lambda done: _best(done, kept)[0])
        for merge in merges:
            key = _key(best.job, merge)
            if key not in tried:
                wanted[key] = (best.job, merge)
    return list(wanted.values())


def by_part(searched: Sequence[Searched], kept: Mapping[str, float]) -> list[tuple[Job, MergeEntry]]:
    """The searches of the third stage; arguments as for :func:`other_merges`."""
    whole = [
        done
        for done in searched
        if done.job.variant is not None and done.job.merge is not None and done.job.merge.method == _WHOLE
    ]
    wanted: dict[Any, tuple[Job, MergeEntry]] = {}
    for group in _groups(whole).values():
        best = max(group, key=lambda done: _best(done, kept)[0])
        start = _best(best, kept)[1]
        if start is None:  # no point of any met every example
            continue
        assert best.job.merge is not None
        merge = replace(best.job.merge, name=BY_PART, start=start)
        wanted[_key(best.job, merge)] = (best.job, merge)
    return list(wanted.values())


def _groups(searched: Iterable[Searched]) -> dict[Any, list[Searched]]:
    """What each attacker has on behalf of each free-rider, of each released model."""
    groups: dict[Any, list[Searched]] = {}
    for done in searched:
        groups.setdefault((done.job.rider.name, done.job.owner, done.job.threat_model), []).append(done)
    return groups


def _best(done: Searched, kept: Mapping[str, float]) -> tuple[tuple[bool, float], Coefficients | None]:
    """How good the best point of a search is, on validation examples, and where it lies."""
    least = kept[done.job.rider.name]
    points = {point: score for point, score in done.found.scores.items() if point in done.found.cells}
    if not points:
        return (False, -1.0), None
    point = max(points, key=lambda place: merit(points[place], least))
    return merit(points[point], least), point


def _key(job: Job, merge: MergeEntry) -> Any:
    variant = job.variant
    assert variant is not None
    return job.rider.name, job.owner, variant.recovery, variant.rider, merge.name
