"""Which experts make the average of all of them better: the search behind ``soup`` (arXiv 2203.05482, recipe 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unmergeable.merges import Linear, merge_state_dicts
from unmergeable.network.disk_weights import swapped
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class Trial:
    """An average that was scored: of which experts, by their numbers from 0, and whether it became the soup."""

    experts: tuple[int, ...]
    score: float
    is_kept: bool


@dataclass(frozen=True)
class GreedySoup:
    """The experts in the soup in the order they joined, the score of each alone, and every average tried."""

    experts: tuple[int, ...]
    scores: tuple[float, ...]
    trials: tuple[Trial, ...]

    @property
    def coefficients(self) -> tuple[float, ...]:
        """1 for an expert in the soup, 0 for one outside."""
        return tuple(float(number in self.experts) for number in range(len(self.scores)))


def find_greedy_soup(
    network: Any,
    experts: Sequence[Callable[[], Mapping[str, Tensor]]],
    score: Callable[[Any], float],
    *,
    progress: Progress = silent,
) -> GreedySoup:
    """Start with the best expert; let the others join, best first, as long as the average does not get worse.

    Args:
        network: of the experts' architecture; it computes with their weights and has its own again afterwards.
        experts: each gives its weights by their names on disk when asked, so that only those of one average need to be
            in memory.
        score: of the network on held-out data; larger is better.
        progress: told of every average scored.
    """
    total, done = 2 * len(experts) - 1, 0

    def score_average(numbers: Sequence[int]) -> float:
        nonlocal done
        states = [experts[number]() for number in numbers]
        average = states[0] if len(states) == 1 else merge_state_dicts(None, states, None, Linear())
        with swapped(network, average):
            found = score(network)
        done += 1
        progress("scoring soups", done, total, "averages")
        return found

    scores = [score_average([number]) for number in range(len(experts))]
    best, *others = sorted(range(len(experts)), key=lambda number: -scores[number])  # stable: ties in their order
    soup, soup_score = [best], scores[best]
    trials = [Trial((best,), soup_score, is_kept=True)]
    for number in others:
        candidate = [*soup, number]
        found = score_average(candidate)
        is_kept = found >= soup_score
        trials.append(Trial(tuple(candidate), found, is_kept))
        if is_kept:
            soup, soup_score = candidate, found
    return GreedySoup(tuple(soup), tuple(scores), tuple(trials))
