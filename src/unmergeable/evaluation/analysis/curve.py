"""Losses and scores of weights on a curve: base + sum_i c_i(position) task_vector_i.

Two curves are standard:

    connectivity   theta_0 + t tau_1 + (1 - t) tau_2      from the second expert (t = 0) to the first (t = 1)
    scaling        theta_0 + s (tau_1 + ... + tau_n)      one scaling coefficient for all task vectors

The first is linear mode connectivity (Frankle et al., arXiv 1912.05671): experts that share a basis lie in one basin,
and the loss hardly rises between them; in different bases there is a barrier,

    max over t of  L(theta_t) - (1 - t) L(theta at 0) - t L(theta at 1)

(Entezari et al., arXiv 2110.06296). The second is the curve of task arithmetic (Ilharco et al., arXiv 2212.04089).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unmergeable.errors import UsageError
from unmergeable.evaluation.analysis.scored import Score
from unmergeable.evaluation.records import Record
from unmergeable.merges.task_vectors import TaskVectors, score_merges

LINE = tuple(number / 10 for number in range(11))
"""Positions from one model to the other."""

COEFFICIENTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)
"""Scaling coefficients from the base past the experts."""


@dataclass(frozen=True)
class Curve(Record):
    """What was scored at each position: losses in nats, credits in [0, 1]."""

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    credits: tuple[float, ...]


def connectivity(network: Any, task_vectors: TaskVectors, score: Score, *, positions: Sequence[float] = LINE) -> Curve:
    """The line between two experts.

    Args:
        network: live; it has its own weights again afterwards.
        task_vectors: of exactly two experts; position 0 is the second, 1 the first.
        score: of the network on the task looked at.

    Raises:
        UsageError: another number of experts.
        Mismatch: the weights do not belong to this network.
    """
    return _along(network, task_vectors, score, positions, lambda position: (position, 1 - position))


def scaling(
    network: Any, task_vectors: TaskVectors, score: Score, *, coefficients: Sequence[float] = COEFFICIENTS
) -> Curve:
    """One coefficient for all task vectors: 0 is the base; with one expert, 1 is that expert.

    Args and errors as in :func:`connectivity`, with any number of experts.
    """
    count = len(task_vectors.vectors)
    return _along(network, task_vectors, score, coefficients, lambda position: (position,) * count)


def barrier(curve: Curve) -> float:
    """The loss barrier of a line from 0 to 1, in nats: how far it rises above the straight line between its ends.

    Never negative, since it is zero at the ends.

    Raises:
        UsageError: the curve does not go from 0 to 1.
    """
    at = dict(zip(curve.positions, curve.losses, strict=True))
    if min(at, default=1.0) != 0 or max(at) != 1:
        raise UsageError("a barrier needs a curve from 0 to 1: measure it at both ends.")
    return max(loss - (1 - share) * at[0.0] - share * at[1.0] for share, loss in at.items())


def _along(
    network: Any,
    task_vectors: TaskVectors,
    score: Score,
    positions: Sequence[float],
    coefficients: Callable[[float], Sequence[float]],
) -> Curve:
    scored = score_merges(network, task_vectors, [coefficients(position) for position in positions], score)
    return Curve(tuple(positions), tuple(one.loss for one in scored), tuple(one.credit for one in scored))
