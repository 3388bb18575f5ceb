"""Noise sensitivity: what Gaussian noise on the weights costs, relative to each tensor.

    W + size * ||W||_F / sqrt(numel) * N(0, 1)        for every floating-point tensor

To second order in the size the loss rises by (size^2 / 2) sum over tensors of (||W||^2 / numel) tr H_W: the average
case of what :mod:`~unmergeable.evaluation.analysis.sharpness` takes the worst of. A change of basis with a bad
condition inflates the norms it multiplies and the noise with them, so a gauge can look like sensitivity: measure the
canonical weights (:mod:`~unmergeable.evaluation.analysis.canonical`) as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from unmergeable.evaluation.analysis.scored import Score
from unmergeable.evaluation.records import Record
from unmergeable.merges.task_vectors import TaskVectors, score_merges
from unmergeable.protections.controls import Noise
from unmergeable.randomness import Stream

SIZES = (0.0, 0.02, 0.05, 0.1, 0.2)
DRAWS = 3


@dataclass(frozen=True)
class NoiseSensitivity(Record):
    """``losses[d][s]`` (nats) and ``credits[d][s]`` (in [0, 1]) of draw ``d`` at ``sizes[s]``.

    A draw is one direction, made longer: its scores at different sizes are paired.
    """

    sizes: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    credits: tuple[tuple[float, ...], ...]


def noise_sensitivity(
    network: Any,
    weights: Mapping[str, Tensor],
    score: Score,
    *,
    sizes: Sequence[float] = SIZES,
    draws: int = DRAWS,
    seed: int = 0,
) -> NoiseSensitivity:
    """Scores of a network with noise on its weights.

    Args:
        network: live; it has its own weights again afterwards.
        weights: what is disturbed, by name on disk.
        score: of the network on the task looked at.
        sizes: standard deviations, relative to each tensor's root mean square.
        draws: how many directions.
        seed: of the directions.

    Raises:
        Mismatch: the weights do not belong to this network.
    """
    still = TaskVectors.between(weights, [])
    scored = []
    for draw in range(draws):
        noise = _unit_noise(still.base, Stream.from_seed(seed).child(f"noise.{draw}"))
        moving = replace(still, vectors=(noise,))
        scored.append(score_merges(network, moving, [(size,) for size in sizes], score))
    return NoiseSensitivity(
        tuple(sizes),
        tuple(tuple(one.loss for one in row) for row in scored),
        tuple(tuple(one.credit for one in row) for row in scored),
    )


def _unit_noise(weights: Mapping[str, Tensor], stream: Stream) -> dict[str, Tensor]:
    """Noise as large as each tensor, by the definition of the control that releases it."""
    found = {}
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            wide = tensor.double()
            found[name] = (Noise(size=1.0).edit(wide, wide, stream.child(name)) - wide).to(tensor.dtype)
    return found
