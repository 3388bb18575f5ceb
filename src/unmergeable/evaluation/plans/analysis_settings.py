"""The ``analyses`` entry of a plan: how closely the models of an audit are looked at.

analyses: {}                                          with the defaults
analyses: {examples: 200, noise: [0, 0.1], points: 11}
"""

from __future__ import annotations

from dataclasses import dataclass

from unmergeable.errors import BadInput
from unmergeable.evaluation.plans.fields import Entry


@dataclass(frozen=True)
class AnalysisSettings:
    """The cost of a model is about that of scoring a hundred sets of weights on ``examples``, by default.

    Attributes:
        examples: of the defended task's test part, at most.
        line: positions between a free-rider's model (0) and the one looked at (1).
        coefficients: of the scaling curve.
        noise: sizes relative to each tensor's root mean square.
        draws: how many directions of noise.
        radii: of the balls in which the worst loss is looked for, relative to each tensor's norm.
        steps: of the ascent in each ball.
        points: of the landscape, along each side.
    """

    examples: int = 100
    line: tuple[float, ...] = tuple(number / 10 for number in range(11))
    coefficients: tuple[float, ...] = (0.0, 0.3, 0.6, 1.0, 1.5, 2.0)
    noise: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2)
    draws: int = 3
    radii: tuple[float, ...] = (0.001, 0.005)
    steps: int = 3
    points: int = 7


_NUMBERS = ("line", "coefficients", "noise", "radii")
_COUNTS = {"examples": 1, "draws": 1, "steps": 1, "points": 2}


def read_analysis_settings(document: object, where: str) -> AnalysisSettings | None:
    """The settings of a plan's entry; None where there is no entry, and nothing is to be looked at.

    Raises:
        BadInput: an unknown setting, one that is no number, or a line that leaves out its ends.
    """
    if document is None:
        return None
    entry, default = Entry(document, (*_COUNTS, *_NUMBERS), where), AnalysisSettings()
    counts = {name: entry.whole(name, getattr(default, name), least=least) for name, least in _COUNTS.items()}
    numbers = {name: entry.numbers(name, getattr(default, name)) for name in _NUMBERS}
    if not {0.0, 1.0} <= set(numbers["line"]):
        raise BadInput(f"{where}, line: must contain 0 and 1, the two models, or there is no barrier.")
    if min(*numbers["noise"], *numbers["radii"]) < 0:
        raise BadInput(f"{where}: noise and radii must not be negative.")
    return AnalysisSettings(**counts, **numbers)  # type: ignore[arg-type]
