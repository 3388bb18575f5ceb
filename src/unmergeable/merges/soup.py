"""``soup``: the average of those experts that make it better on held-out data (greedy soup, arXiv 2203.05482).

Experts are fine-tunes of one base on one task. The best of them starts the soup; the others, in the order of their
validation scores, join the average as long as the score of the average does not fall (recipe 1 of the paper). What is
written is

    theta = mean of theta_i over the experts in the soup

Here an expert outside it has the coefficient 0. Without data every expert is in: the paper's uniform soup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import ClassVar

from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Inputs, Merge, TensorMerge, TermsOf
from unmergeable.merges.engine import merge_state_dicts
from unmergeable.merges.learning import LearningInputs, LearntMerge, require_examples
from unmergeable.merges.linear import Linear
from unmergeable.network.disk_weights import Weights, swapped, weights_of
from unmergeable.network.tasks import accuracy
from unmergeable.progress import Progress, silent
from unmergeable.registry import Requirements

BATCH_SIZE = 32
"""Of examples that are scored."""


@dataclass(frozen=True)
class Soup(Merge):
    """``examples`` is the most that are read of each data set; they are labelled, and not those trained on."""

    name: ClassVar[str] = "soup"
    needs_positive: ClassVar[bool] = True

    examples: int = 1000
    seed: int = 0

    def requirements(self) -> Requirements:
        return Requirements(needs=("data",))

    def validate(self) -> None:
        require_examples(self.examples)

    @contextmanager
    def learn(self, inputs: LearningInputs) -> Iterator[LearntMerge]:
        experts = inputs.experts
        if not inputs.data:
            raise UsageError(f"soup: {len(experts)} experts and data of 0; give --data at least once.")
        if any(value is not None for value in inputs.coefficients):
            raise UsageError("soup chooses its experts by their scores; give them without coefficients.")
        tasks = inputs.tasks(batch_size=BATCH_SIZE, examples=self.examples, seed=self.seed, is_labelled=True)

        def score(weights: Mapping[str, Tensor]) -> float:
            with swapped(inputs.network, weights) as network:
                return fmean(accuracy(network, task) for task in tasks)

        states = [partial(inputs.state, expert) for expert in experts]
        chosen = find_greedy_soup(states, score, progress=inputs.progress)
        facts = {
            **inputs.facts,
            "scores": list(chosen.scores),
            "trials": [
                {"experts": [n + 1 for n in trial.experts], "score": trial.score, "kept": trial.is_kept}
                for trial in chosen.trials
            ],
            "soup": [number + 1 for number in chosen.experts],
        }
        yield LearntMerge(self, chosen.coefficients, facts=facts, summary=chosen.summary)

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        return Linear().prepare(inputs, terms)


def soup(
    base: Weights | None,
    experts: Sequence[Weights],
    *,
    score: Callable[[Mapping[str, Tensor]], float] | None = None,
    coefficients: Sequence[float | None] | None = None,
) -> dict[str, Tensor]:
    """The average of the experts that make it better on held-out data (greedy soup, arXiv 2203.05482), in memory.

    Args:
        base: takes no part but as the template of order and buffers; None for the first expert.
        experts: state dicts or live networks.
        score: of an average on held-out data, larger is better; None averages all experts (uniform soup).
        coefficients: instead of a score, 1 for each expert in the soup and 0 for the others.

    Raises:
        UsageError: both a score and coefficients are given; fewer than two experts.
        Mismatch, BadInput: as :func:`~unmergeable.merges.merge_state_dicts`.
    """
    if score is not None:
        if coefficients is not None:
            raise UsageError("soup chooses its experts by their scores; give either a score or coefficients.")
        coefficients = find_greedy_soup([partial(weights_of, expert) for expert in experts], score).coefficients
    return merge_state_dicts(base, experts, method=Soup(), coefficients=coefficients)


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

    @property
    def summary(self) -> str:
        """The experts, counted from 1, and what their average gains over the best of them."""
        kept = [trial.score for trial in self.trials if trial.is_kept]
        experts = ", ".join(str(number + 1) for number in self.experts)
        return f"In the soup: experts {experts} (score {kept[-1]:.4f}; the best alone {kept[0]:.4f})"


def find_greedy_soup(
    experts: Sequence[Callable[[], Mapping[str, Tensor]]],
    score: Callable[[Mapping[str, Tensor]], float],
    *,
    progress: Progress = silent,
) -> GreedySoup:
    """Start with the best expert; let the others join, best first, as long as the average does not get worse.

    Args:
        experts: each gives its weights by their names on disk when asked, so that only those of one average need to be
            in memory.
        score: of weights on held-out data; larger is better.
        progress: told of every average scored.
    """
    total, done = 2 * len(experts) - 1, 0

    def score_average(numbers: Sequence[int]) -> float:
        nonlocal done
        states = [experts[number]() for number in numbers]
        result = score(states[0] if len(states) == 1 else merge_state_dicts(None, states, method=Linear()))
        done += 1
        progress("scoring soups", done, total, "averages")
        return result

    scores = [score_average([number]) for number in range(len(experts))]
    best, *others = sorted(range(len(experts)), key=lambda number: -scores[number])  # stable: ties in their order
    members, members_score = [best], scores[best]
    trials = [Trial((best,), members_score, is_kept=True)]
    for number in others:
        candidate = [*members, number]
        candidate_score = score_average(candidate)
        is_kept = candidate_score >= members_score
        trials.append(Trial(tuple(candidate), candidate_score, is_kept))
        if is_kept:
            members, members_score = candidate, candidate_score
    return GreedySoup(tuple(members), tuple(scores), tuple(trials))
