"""What may be wrong with a figure although nothing failed: said beside it, and some of it in place of it.

The idea is AutoAttack's, which warns where an attack cannot be trusted to be the strongest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from unmergeable.attacks.base import NOT_RECOGNISED

Flag = Literal["edge", "not_recognised", "undecided_control", "uncertain_denominator", "few_examples", "bar_decides"]

FLAGS: Mapping[Flag, str] = {
    "edge": "the best coefficients found lie on the edge of those that were tried; others may do better",
    "not_recognised": "no recovery brought the release near its base: what was done to it was not recognised",
    "undecided_control": "a control is beyond its bound by no more than luck with so few examples may be",
    "uncertain_denominator": "what the unprotected expert adds to a merge is less than two standard errors",
    "few_examples": "fewer than 200 examples decide which attacks keep the free-rider's skill",
    "bar_decides": "at another share of kept skill the judgement is another",
}
"""The flags, and what each says of the figure it stands beside."""

DOUBTS: frozenset[Flag] = frozenset({"not_recognised", "undecided_control"})
"""Under these nobody is said to be stopped: the attack may have been too weak."""

FEWEST_EXAMPLES = 200
"""Of the free-rider's task, on validation: with these a share of 95 % is known to 1.5 points (one standard error)."""

FAR = 2.0
"""Times the unprotected expert's distance to the base: what is left so far from it was not undone."""

STANDARD_ERRORS = 2.0
"""Of the denominator, below which it may be nothing."""

Point = Sequence[float]


def is_on_edge(point: Point | None, tried: Iterable[Point | None]) -> bool:
    """Whether a coefficient is the largest that was tried, or the smallest above 0, of several along its axis.

    A coefficient of 0 is no edge: there a model is left out.
    """
    if point is None:
        return False
    others = [other for other in tried if other is not None and len(other) == len(point)]
    for axis, value in enumerate(point):
        places = {other[axis] for other in others}
        if len(places) > 1 and (value == max(places) or value == min(places) > 0):
            return True
    return False


def is_recognised(facts: Mapping[str, Any], distance_of_expert: float | None) -> bool:
    """Whether a recovery undid what was done, by what it reported and the unprotected expert's distance to the base."""
    if facts.get("findings", {}).get("result") == NOT_RECOGNISED:
        return False
    after, confidence = facts.get("distance_after"), facts.get("confidence")
    if after is None or confidence is None:
        return facts.get("method") == "block_regression"  # it fits outputs, and says by itself what they do not explain
    return confidence > 0 and (not distance_of_expert or bool(after <= FAR * distance_of_expert))
