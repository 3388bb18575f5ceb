"""The invertible matrix that brings a head nearest to the base's: min_M ||M W' - W0||^2 + ||M^-T U' - U0||^2.

W' stacks everything that transforms as M x (queries, or values, with their biases) and U' everything that transforms
as M^-T x (keys, or output columns) of the protected checkpoint; W0 and U0 are the base's. Neither term alone is
enough: the first is blind to errors that the second magnifies.

Start: W0 = M W' and U' = M^T U0 hold together at a planted key and are both linear in M, so least squares gives one
Sylvester equation,

    M (W'W'^T) + (U0 U0^T) M = W0 W'^T + U0 U'^T

Then Gauss-Newton on the multiplicative update M <- e^X M, which never leaves the invertible matrices: with W = M W'
and U = M^-T U',

    (U U^T) X + X (W W^T) = (W0 - W) W^T - U (U0 - U)^T

and half the step wherever the objective would rise. Only second moments are needed, [size, size] per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unmergeable.attacks.moments import Moments

MAX_STEPS = 100
RELATIVE_PROGRESS = 1e-8
"""A head is done when a step changes its objective by no more than this share."""

ROUNDING = 1e-15
"""Changes of the objective below this share of the base's squared norm are rounding."""

SMALLEST_FRACTION = 2.0**-10
"""A head is done, too, when not even this fraction of a step lowers its objective: only rounding is left."""

LONGEST_STEP = 2.0
"""Largest Frobenius norm of X in one update: e^2 either way, beyond which linearising means nothing."""

RIDGE = 1e-12
"""Share of the largest eigenvalue added to a singular Sylvester operator: where the data say nothing, nothing moves."""


def nearest_general_linear(vectors: Moments, covectors: Moments) -> Tensor:
    """The matrices M, float64 [blocks, size, size].

    Never worse than the identity; heads without any data get the identity. A local minimum in general, the global
    one where the checkpoint is the base plus something small in an unknown basis.
    """
    objective = _Objective(vectors, covectors)
    matrices = objective.best_of(_starts(vectors, covectors))
    values = objective(matrices)
    fractions = torch.ones_like(values)
    for _ in range(MAX_STEPS):
        steps = fractions[:, None, None] * _direction(matrices, vectors, covectors)
        trials = torch.matrix_exp(steps) @ matrices
        trial_values = objective(trials)
        is_lower = trial_values < values
        change = (values - trial_values).abs()
        is_done = (change <= RELATIVE_PROGRESS * values + ROUNDING * objective.scale) | (fractions < SMALLEST_FRACTION)
        matrices = torch.where(is_lower[:, None, None], trials, matrices)
        values = torch.where(is_lower, trial_values, values)
        fractions = torch.where(is_lower, (2 * fractions).clamp(max=1.0), fractions / 2)
        if bool(is_done.all()):
            break
    return matrices


class _Objective:
    """The sum of both squared distances per block; ``scale`` is its value when nothing is matched."""

    def __init__(self, vectors: Moments, covectors: Moments) -> None:
        self._sides = (vectors, covectors)
        self.scale = _trace(vectors.base) + _trace(covectors.base)

    def __call__(self, matrices: Tensor) -> Tensor:
        """Values at ``matrices`` [..., blocks, size, size]; infinite where one is singular."""
        inverses, failed = torch.linalg.inv_ex(matrices)
        total = _squared_distance(matrices, self._sides[0]) + _squared_distance(inverses.mT, self._sides[1])
        return torch.where((failed == 0) & total.isfinite(), total, torch.inf)

    def best_of(self, candidates: list[Tensor]) -> Tensor:
        """For each block the candidate with the lowest value, the earlier one of equals."""
        stacked = torch.stack(candidates)
        chosen = self(stacked).argmin(0)
        return stacked[chosen, torch.arange(stacked.shape[1])]


def _squared_distance(matrix: Tensor, moments: Moments) -> Tensor:
    quadratic = (matrix * (matrix @ moments.protected)).sum((-1, -2))
    linear = (matrix * moments.cross).sum((-1, -2))
    distance: Tensor = quadratic - 2 * linear + _trace(moments.base)
    return distance


def _trace(matrix: Tensor) -> Tensor:
    return torch.diagonal(matrix, dim1=-2, dim2=-1).sum(-1)


def _starts(vectors: Moments, covectors: Moments) -> list[Tensor]:
    identity = torch.eye(vectors.cross.shape[-1], dtype=torch.float64).expand_as(vectors.cross)
    both_sides = _sylvester(covectors.base, vectors.protected, vectors.cross + covectors.cross, around=identity)
    return [identity, both_sides]


def _direction(matrices: Tensor, vectors: Moments, covectors: Moments) -> Tensor:
    """The Gauss-Newton X, no longer than LONGEST_STEP."""
    contragredient = torch.linalg.inv(matrices).mT
    w, w_cross = _moved(matrices, vectors)
    u, u_cross = _moved(contragredient, covectors)
    step = _sylvester(u, w, (w_cross - w) - (u_cross - u).mT)
    length = torch.linalg.matrix_norm(step, ord="fro").clamp(min=1e-300)
    shortened: Tensor = step * (LONGEST_STEP / length).clamp(max=1.0)[:, None, None]
    return shortened


def _moved(matrix: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """``protected`` and ``cross`` after the protected side is multiplied by ``matrix``."""
    return matrix @ moments.protected @ matrix.mT, moments.cross @ matrix.mT


def _sylvester(left: Tensor, right: Tensor, value: Tensor, *, around: Tensor | None = None) -> Tensor:
    """X with ``left X + X right = value`` for symmetric positive semidefinite ``left`` and ``right``, batched.

    Where the operator is singular X stays at ``around`` (zero unless given).
    """
    left_values, left_vectors = torch.linalg.eigh(left)
    right_values, right_vectors = torch.linalg.eigh(right)
    sums = left_values.clamp(min=0)[:, :, None] + right_values.clamp(min=0)[:, None, :]
    ridge = (RIDGE * sums.amax((1, 2), keepdim=True)).clamp(min=1e-300)
    if around is not None:
        value = value + ridge * around
    solution: Tensor = left_vectors @ ((left_vectors.mT @ value @ right_vectors) / (sums + ridge)) @ right_vectors.mT
    return solution
