"""Planes in the space of weights: where models lie on them, and the loss at every point.

A plane is given by coefficients of task vectors,

    theta(x, y) = theta_0 + sum_i (origin_i + x first_i + y second_i) tau_i

with axes of length 1 at right angles in the Frobenius norm, so that a picture has the same scale both ways. All it
takes is the Gram matrix of the task vectors, which one pass over the files gives.

    through the base and two models   the plane in which they are merged (Garipov et al., arXiv 1802.10026)
    principal                         the plane nearest to all models and the base (Li et al., arXiv 1712.09913)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmergeable.attacks.task_vectors import common_tensors, inner_products
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput
from unmergeable.evaluation.analysis.scored import Score
from unmergeable.evaluation.records import Record
from unmergeable.merges.task_vectors import TaskVectors, score_merges
from unmergeable.progress import Progress, silent

INDEPENDENT = 1e-6
"""Two directions whose difference is smaller than this share of them are one."""


@dataclass(frozen=True)
class Place:
    """A model seen from a plane: its foot, and how far off the plane it is; all in the Frobenius norm of weights."""

    x: float
    y: float
    off_plane: float


@dataclass(frozen=True)
class Plane:
    """Coefficients of n task vectors: of the origin, and of two axes that are orthonormal as weights."""

    origin: tuple[float, ...]
    first: tuple[float, ...]
    second: tuple[float, ...]

    def coefficients(self, x: float, y: float) -> tuple[float, ...]:
        """Of every task vector at a point of the plane."""
        return tuple(o + x * a + y * b for o, a, b in zip(self.origin, self.first, self.second, strict=True))

    def place(self, gram: Tensor, coefficients: Sequence[float]) -> Place:
        """Where base + sum_i c_i tau_i lies, for the Gram matrix [n, n] that the plane was made from."""
        from_origin = _vector(coefficients) - _vector(self.origin)
        x, y = (float(_vector(axis) @ gram @ from_origin) for axis in (self.first, self.second))
        squared = float(from_origin @ gram @ from_origin)
        return Place(x, y, math.sqrt(max(0.0, squared - x * x - y * y)))

    def places(self, gram: Tensor) -> tuple[Place, ...]:
        """Of the base, then of every model."""
        count = len(self.origin)
        models = torch.eye(count, dtype=torch.float64).tolist()
        return tuple(self.place(gram, coefficients) for coefficients in ([0.0] * count, *models))


@dataclass(frozen=True)
class Landscape(Record):
    """Scores on a grid of a plane: ``losses[row][column]`` (nats) and ``credits`` at ``ys[row]``, ``xs[column]``."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    credits: tuple[tuple[float, ...], ...]


def task_vector_gram(models: Sequence[TensorSource], base: TensorSource, progress: Progress = silent) -> Tensor:
    """Inner products of whole task vectors, float64 [n, n], over the floating-point tensors that all hold alike.

    Raises:
        BadInput: one of them holds NaN or infinity, or they have no tensor in common.
    """
    names = common_tensors([base, *models])
    if not names:
        raise BadInput(f"{base.description} has no tensor in common with the other models; give models of one base.")
    total = torch.zeros(len(models), len(models), dtype=torch.float64)
    for number, name in enumerate(names, start=1):
        total += inner_products(models, base, name)[:-1, :-1]
        progress("comparing", number, len(names), "tensors")
    return total


def plane_through(gram: Tensor, first: int, second: int) -> Plane:
    """The plane of the base (the origin), model ``first`` (on the x axis, to the right) and model ``second`` (above).

    Args:
        gram: of the task vectors, float64 [n, n].

    Raises:
        BadInput: the three lie on one line.
    """
    units = torch.eye(len(gram), dtype=torch.float64)
    right, other = units[first], units[second]
    length = math.sqrt(float(gram[first, first]))
    if length > 0:
        right = right / length
    up = other - float(right @ gram @ other) * right
    height = math.sqrt(max(0.0, float(up @ gram @ up)))
    if length == 0 or height <= INDEPENDENT * math.sqrt(float(gram[second, second])):
        raise BadInput("the base and the two models lie on one line: there is no plane through them.")
    return Plane((0.0,) * len(gram), tuple(right.tolist()), tuple((up / height).tolist()))


def principal_plane(gram: Tensor) -> tuple[Plane, tuple[float, float]]:
    """The plane nearest to the base and all models, through their mean, and the share of the variance on each axis.

    Args:
        gram: of the task vectors, float64 [n, n].

    Raises:
        BadInput: they lie on one line.
    """
    count = len(gram)
    points = torch.cat([torch.zeros(1, count, dtype=torch.float64), torch.eye(count, dtype=torch.float64)])
    mean = points.mean(dim=0)
    centred = points - mean
    variances, directions = torch.linalg.eigh(centred @ gram @ centred.T)
    total = float(variances.clamp_min(0).sum())
    if count < 2 or float(variances[-2]) <= INDEPENDENT**2 * total:
        raise BadInput("the base and the models lie on one line: there is no plane through them.")
    axes = []
    for variance, direction in ((variances[-1], directions[:, -1]), (variances[-2], directions[:, -2])):
        upright = direction * torch.sign(direction[direction.abs().argmax()])  # an eigenvector's sign is any
        axes.append(tuple((centred.T @ upright / variance.sqrt()).tolist()))
    shares = (float(variances[-1]) / total, float(variances[-2]) / total)
    return Plane(tuple(mean.tolist()), axes[0], axes[1]), shares


def grid(values: Sequence[float], points: int, *, margin: float = 0.25) -> tuple[float, ...]:
    """Evenly spaced numbers that cover ``values`` and ``margin`` times their range on either side."""
    low, high = min(values), max(values)
    edge = margin * (high - low)
    return tuple(torch.linspace(low - edge, high + edge, points, dtype=torch.float64).tolist())


def landscape(
    network: Any, task_vectors: TaskVectors, plane: Plane, score: Score, *, xs: Sequence[float], ys: Sequence[float]
) -> Landscape:
    """Scores at every point of a grid, one merge and one pass over the examples each.

    Args:
        network: live; it has its own weights again afterwards.
        task_vectors: those the plane was made from, in that order.
        score: of the network on the task looked at.

    Raises:
        UsageError: another number of task vectors than the plane has coefficients.
        Mismatch: the weights do not belong to this network.
    """
    points = [plane.coefficients(x, y) for y in ys for x in xs]
    scored = score_merges(network, task_vectors, points, score)
    rows = [scored[start : start + len(xs)] for start in range(0, len(scored), len(xs))]
    return Landscape(
        tuple(xs),
        tuple(ys),
        tuple(tuple(one.loss for one in row) for row in rows),
        tuple(tuple(one.credit for one in row) for row in rows),
    )


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
