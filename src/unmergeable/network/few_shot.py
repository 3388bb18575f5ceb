"""Few-shot training of weights in a live network: the learning rate by cross-validation, then all examples.

See :mod:`unmergeable.attacks.few_shot` for the idea.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmergeable.attacks.few_shot import FewShot, parse_rates, turns
from unmergeable.errors import BadInput, DiskError, UnmergeableError, UsageError
from unmergeable.network.disk_weights import Place, find_places, show, swapped, to_disk_names
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import Judgement, added, fine_tune, gather_examples, judge, padding_token, select
from unmergeable.network.low_rank import low_rank_updates
from unmergeable.network.tasks import Task
from unmergeable.network.train import Schedule
from unmergeable.progress import Progress, silent

_ALPHA_PER_RANK = 2.0
"""Updates of low rank are scaled by this; the sweep over rates makes its value of little account."""

Trained = Callable[[Any], AbstractContextManager[Callable[[str], bool]]]
"""A network, to a context that says which of its parameters are trained, and puts them in their place at its end."""


@dataclass(frozen=True)
class Trial:
    """A learning rate and what came of it on the examples left out; 0 stands for the weights as they were.

    ``accuracy`` and ``loss`` (nats) are means over ``choices``; NaN where the training diverged.
    """

    learning_rate: float
    choices: int
    accuracy: float
    loss: float


@dataclass(frozen=True)
class FewShotResult:
    """Attributes:
    weights: by their names on disk, in the network's dtype.
    learning_rate: the one chosen; 0 if no training did better.
    losses: of each step of the last training, before that step.
    trials: the sweep, in the order of the rates; empty where there was only one rate.
    """

    weights: Mapping[str, Tensor]
    learning_rate: float
    losses: tuple[float, ...]
    trials: tuple[Trial, ...]


def few_shot(
    network: Any,
    weights: Mapping[str, Tensor],
    train_task: Task,
    method: FewShot,
    *,
    trained: Trained | None = None,
    progress: Progress = silent,
) -> FewShotResult:
    """Train ``weights`` on the first ``method.samples`` examples of a task.

    Args:
        network: of their architecture; it has its own weights again afterwards.
        weights: where training starts, by the names on disk; they are copied. The same call with those of a model
            without the victim is the control.
        train_task: labelled examples, or texts for a causal language model, in an order that means nothing.
        method: how much and how.
        trained: what may change, and how; None for what ``method.low_rank`` says.
        progress: told of the steps.

    Raises:
        BadInput: too few examples, no labels, or a network that does not take them.
        Mismatch: the weights do not belong to this network.
        UnmergeableError: the only rate there is makes the training diverge.
    """
    method.validate()
    examples = gather_examples(train_task, method.samples, pad=padding_token(network))
    training = _Training(network, weights, train_task, method, trained or _trained(method), progress)
    rates = parse_rates(method.learning_rates)
    trials: tuple[Trial, ...] = ()
    with swapped(network, weights):
        places = find_places(network)
        best = rates[0]
        if len(rates) > 1:
            trials = tuple(training.trial(places, examples, rate) for rate in (0.0, *rates))
            best = _best(trials).learning_rate
        losses = training.run(places, examples, best)
        found = to_disk_names(network, network.state_dict())
        result = {name: found[name].detach().clone() for name in weights}
    return FewShotResult(result, best, losses, trials)


@dataclass(frozen=True)
class _Training:
    """One start, one task, one way of training; any rate and any choice of the examples."""

    network: Any
    weights: Mapping[str, Tensor]
    task: Task
    method: FewShot
    trained: Trained
    progress: Progress

    def run(self, places: Mapping[str, Place], examples: EncodedBatch, learning_rate: float) -> tuple[float, ...]:
        """Start afresh and train; the network computes with the result."""
        show(places, {name: tensor.clone() for name, tensor in self.weights.items()})
        if learning_rate == 0:
            return ()
        with self.trained(self.network) as is_trained:
            losses = fine_tune(
                self.network,
                self.task.predict,
                examples,
                Schedule(self.method.steps, learning_rate),
                batch_size=self.method.batch_size,
                is_trained=is_trained,
                seed=self.method.seed,
                stage=f"training at rate {learning_rate:g}",
                progress=self.progress,
            )
        return tuple(losses)

    def trial(self, places: Mapping[str, Place], examples: EncodedBatch, learning_rate: float) -> Trial:
        """What a rate is worth on examples that were left out of the training."""
        found: list[Judgement] = []
        for kept, left_out in _splits(len(examples), self.method.seed):
            try:
                self.run(places, select(examples, kept), learning_rate)
            except (UsageError, BadInput, DiskError):
                raise
            except UnmergeableError:  # the loss is no longer finite: the rate is too high
                return Trial(learning_rate, 0, math.nan, math.nan)
            held_out = select(examples, left_out)
            found.append(judge(self.network, self.task.predict, held_out, batch_size=self.method.batch_size))
        whole = added(found)
        return Trial(learning_rate, whole.choices, whole.accuracy, whole.mean_loss)


def _splits(count: int, seed: int) -> Sequence[tuple[Tensor, Tensor]]:
    """Numbers of the examples to train on and to judge by, for every turn."""
    folds, used = turns(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split(folds)
    return [(torch.cat([part for part in parts if part is not left_out]), left_out) for left_out in parts[:used]]


def _best(trials: Sequence[Trial]) -> Trial:
    """The lowest loss among the rates whose accuracy is within a standard error of the best one."""
    ended = [trial for trial in trials if math.isfinite(trial.loss)]
    if not ended:
        raise UnmergeableError("no rate gives a finite loss, nor do the weights as they are; look for NaN in them.")
    leader = max(ended, key=lambda trial: trial.accuracy)
    # Laplace's rule of succession: none wrong of a few does not mean that none can be.
    likely = (leader.accuracy * leader.choices + 1) / (leader.choices + 2)
    enough = leader.accuracy - math.sqrt(likely * (1 - likely) / leader.choices)
    return min((trial for trial in ended if trial.accuracy >= enough), key=lambda trial: trial.loss)


def _trained(method: FewShot) -> Trained:
    if method.low_rank == 0:
        return _all_weights
    rank = method.low_rank
    return lambda network: low_rank_updates(network, rank=rank, alpha=_ALPHA_PER_RANK * rank, seed=method.seed)


@contextmanager
def _all_weights(network: Any) -> Iterator[Callable[[str], bool]]:
    yield lambda name: True
