"""``few_shot``: train what was protected, or a merge that contains it, on a handful of labelled examples.

    min over theta of the mean cross-entropy on n examples, from theta = the weights as they are

An attacker who has no task data left cannot train; one who has a little can, and a merge that looks broken may be a few
steps away from working. n = 16, 100 and 1000 are the usual sizes. ``low_rank=0`` trains all weights, r > 0 an update of
rank r beside every linear layer (LoRA, arXiv 2106.09685), and ``last_layers=k`` the last k layers alone.

The attacker has n labelled examples in all, so they choose the learning rate too: by cross-validation in ``FOLDS``
folds, of which as many take a turn as ``JUDGED`` examples need (all with n = 16, one with n = 1000). Not training
at all is one of the choices. Of the rates whose accuracy on the examples left out is within a standard error of the
best, that with the lowest loss there wins: a few more right may be luck. Then all n are trained on with it.

What this is worth is the lead over the same examples, steps and rates from a start without the victim: the base, or a
model given as a source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from unmergeable.attacks.base import AttackRequirements, Inputs, Recovered
from unmergeable.attacks.live import edits_to, is_polynomial, load, state_for, state_without_victim
from unmergeable.checkpoint.disk_names import to_disk_names
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, DiskError, UnmergeableError, UsageError
from unmergeable.network.disk_weights import Place, find_places, show, swapped
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import Judgement, added, fine_tune, gather_examples, judge, padding_token, select
from unmergeable.network.low_rank import low_rank_updates
from unmergeable.network.precision import FULL, Precision
from unmergeable.network.tasks import Task
from unmergeable.network.train import Schedule
from unmergeable.progress import Progress, silent
from unmergeable.settings import ADDED_LATER

FOLDS = 4
JUDGED = 50
"""Enough to tell rates that are ten times apart; with more, the sweep would cost more than the training."""

_LAYER = re.compile(r"(?P<stack>.*?)(?:^|\.)(?P<number>\d+)\.")

_ALPHA_PER_RANK = 2.0
"""Updates of low rank are scaled by this; the sweep over rates makes its value of little account."""

Trained = Callable[[Any], AbstractContextManager[Callable[[str], bool]]]
"""A network, to a context that says which of its parameters are trained, and puts them in their place at its end."""


@dataclass(frozen=True)
class FewShot:
    """Settings of the attack.

    Attributes:
        samples: labelled examples that the attacker has in all.
        learning_rates: peaks to choose among, separated by commas; with one there is no choice, hence no validation.
        steps: of each training.
        batch_size: examples of a step, or all if there are fewer.
        low_rank: 0 to train all weights, else the rank of the updates.
        seed: of the examples, the folds, their order, and the start of low-rank updates.
        last_layers: 0 to train every layer, else how many of the last ones; what stands before or between layers, such
            as embeddings, is not trained then.
    """

    name: ClassVar[str] = "few_shot"
    summary: ClassVar[str] = "train on n labelled examples, and see how far the same gets without the victim"

    samples: int = 100
    learning_rates: str = "3e-5,1e-4,3e-4,1e-3"
    steps: int = 100
    batch_size: int = 16
    low_rank: int = 0
    seed: int = 0
    last_layers: int = field(default=0, metadata=ADDED_LATER)

    def validate(self) -> None:
        require_training(self.samples, self.steps, self.batch_size)
        parse_rates(self.learning_rates)
        if self.low_rank < 0:
            raise UsageError(f"low_rank={self.low_rank}: give 0 to train all weights, or a rank.")
        if self.last_layers < 0:
            raise UsageError(f"last_layers={self.last_layers}: give 0 to train every layer, or how many of the last.")
        if self.low_rank and self.last_layers:
            raise UsageError("low_rank and last_layers: give one of them; updates of low rank lie beside every layer.")

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(needs=("base", "data"), accepts=("sources",), structure="polynomial")

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Train the protected checkpoint, and for comparison the one source, or the base.

        Raises:
            UsageError: more than one source.
            Mismatch: the source is no model of the victim's architecture.
            BadInput: the examples cannot be used.
        """
        if len(inputs.sources) > 1:
            raise UsageError("few_shot: give one --source, the model without the victim, or none for the base.")
        data = inputs.require_data(self.name)
        network = load(inputs.protected)
        task = data.labelled(network, samples=self.samples, seed=self.seed)
        attack = few_shot(network, state_for(network, inputs.protected), task, self, progress=progress)
        other = inputs.sources[0] if inputs.sources else inputs.base
        if is_polynomial(other) == is_polynomial(inputs.protected):
            start = state_without_victim(network, other, inputs)
        else:  # the victim's structure is its own
            network = load(other)
            start = state_for(network, other)
        control = few_shot(network, start, task, self, progress=progress)
        return compared(inputs, attack, other, control)


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
    """What training made of one start.

    Attributes:
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
    precision: Precision = FULL,
    progress: Progress = silent,
) -> FewShotResult:
    """Train ``weights`` on the first ``method.samples`` examples of a task.

    Args:
        network: of their architecture; it has its own weights again afterwards.
        weights: where training starts, by the names on disk; they are copied. The same call with those of a model
            without the victim is the control.
        train_task: labelled examples, or texts for a causal language model, in an order that means nothing.
        method: the settings.
        trained: what may change, and how; None for what ``method.low_rank`` says.
        precision: of the training, see :func:`unmergeable.network.train.train`.
        progress: called with the steps done.

    Raises:
        BadInput: too few examples, no labels, or a network that does not take them.
        Mismatch: the weights do not belong to this network.
        UnmergeableError: the only rate there is makes the training diverge.
    """
    method.validate()
    examples = gather_examples(train_task, method.samples, pad=padding_token(network))
    training = _Training(network, weights, train_task, method, trained or _trained(method), precision, progress)
    rates = parse_rates(method.learning_rates)
    trials: tuple[Trial, ...] = ()
    with swapped(network, weights):
        places = find_places(network)
        best = rates[0]
        if len(rates) > 1:
            trials = tuple(training.trial(places, examples, rate) for rate in (0.0, *rates))
            best = _best(trials).learning_rate
        losses = training.run(places, examples, best)
        on_disk = to_disk_names(network, network.state_dict())
        result = {name: on_disk[name].detach().clone() for name in weights}
    return FewShotResult(result, best, losses, trials)


@dataclass(frozen=True)
class _Training:
    """One start, one task, one way of training; any rate and any choice of the examples."""

    network: Any
    weights: Mapping[str, Tensor]
    task: Task
    method: FewShot
    trained: Trained
    precision: Precision
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
                precision=self.precision,
                stage=f"training at rate {learning_rate:g}",
                progress=self.progress,
            )
        return tuple(losses)

    def trial(self, places: Mapping[str, Place], examples: EncodedBatch, learning_rate: float) -> Trial:
        """What a rate is worth on examples that were left out of the training."""
        judgements: list[Judgement] = []
        for kept, left_out in _splits(len(examples), self.method.seed):
            try:
                self.run(places, select(examples, kept), learning_rate)
            except (UsageError, BadInput, DiskError):
                raise
            except UnmergeableError:  # the loss is no longer finite: the rate is too high
                return Trial(learning_rate, 0, math.nan, math.nan)
            held_out = select(examples, left_out)
            judgements.append(judge(self.network, self.task.predict, held_out, batch_size=self.method.batch_size))
        whole = added(judgements)
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
    if method.last_layers:
        return partial(_last_layers, count=method.last_layers)
    if method.low_rank == 0:
        return _all_weights
    rank = method.low_rank
    return lambda network: low_rank_updates(network, rank=rank, alpha=_ALPHA_PER_RANK * rank, seed=method.seed)


@contextmanager
def _last_layers(network: Any, count: int) -> Iterator[Callable[[str], bool]]:
    names = in_last_layers([name for name, _ in network.named_parameters()], count)
    if not names:
        raise UsageError(
            f"last_layers={count}: {type(network).__name__} has no layers that are numbered; leave it out."
        )
    yield names.__contains__


def in_last_layers(names: Sequence[str], count: int) -> frozenset[str]:
    """The parameters of the last ``count`` layers, of every stack of layers there is (encoder and decoder, for one).

    A layer is what stands under a number in the names: ``model.layers.11.mlp.up_proj.weight``; of numbers inside one
    another (experts in a layer) the first counts.
    """
    found = {name: match for name in names if (match := _LAYER.match(name)) is not None}
    depth: dict[str, int] = {}
    for match in found.values():
        depth[match["stack"]] = max(depth.get(match["stack"], 0), 1 + int(match["number"]))
    return frozenset(name for name, match in found.items() if int(match["number"]) >= depth[match["stack"]] - count)


@contextmanager
def _all_weights(network: Any) -> Iterator[Callable[[str], bool]]:
    yield lambda name: True


@dataclass(frozen=True)
class Run:
    """A training as the result of an attack reports it; ``start`` is the folder of the weights it began with."""

    start: Path
    learning_rate: float
    losses: tuple[float, ...]
    trials: tuple[Trial, ...]

    @classmethod
    def of(cls, start: TensorSource, result: FewShotResult) -> Run:
        return cls(start.folder, result.learning_rate, result.losses, result.trials)

    def to_json(self) -> dict[str, Any]:
        """JSON has no NaN: null where the training diverged."""
        return {
            "start": str(self.start),
            "learning_rate": self.learning_rate,
            "losses": list(self.losses),
            "sweep": [
                {name: None if math.isnan(value) else value for name, value in asdict(trial).items()}
                for trial in self.trials
            ],
        }

    def __str__(self) -> str:
        rate = f"learning rate {self.learning_rate:g}" if self.learning_rate else "not trained: no learning rate helped"
        accuracies = {trial.learning_rate: trial.accuracy for trial in self.trials}
        if not accuracies:
            return rate
        return f"{rate}; accuracy on examples left out {accuracies[0.0]:.3f} -> {accuracies[self.learning_rate]:.3f}"


@dataclass(frozen=True)
class Comparison:
    """The same training with the victim and without it, on the examples in ``data``."""

    data: Path
    with_victim: Run
    without_victim: Run

    def to_json(self) -> dict[str, Any]:
        return {
            "data": str(self.data),
            "with_victim": self.with_victim.to_json(),
            "without_victim": self.without_victim.to_json(),
        }

    def lines(self) -> list[str]:
        runs = (("Trained", self.with_victim), ("The same without the victim", self.without_victim))
        return [f"{what}, from {run.start}: {run}" for what, run in runs]


def compared(inputs: Inputs, attack: FewShotResult, other: TensorSource, control: FewShotResult) -> Recovered:
    """The victim as trained, with how ``control`` fared from ``other``, a start without the victim."""
    assert inputs.data is not None
    learnt = Comparison(inputs.data.path, Run.of(inputs.protected, attack), Run.of(other, control))
    return Recovered(inputs.protected, edits_to(attack.weights, inputs.protected), learnt=learnt)


def require_training(samples: int, steps: int, batch_size: int) -> None:
    """Raise UsageError unless there is something to train on and to hold out."""
    if samples < 2:
        raise UsageError(f"samples={samples}: at least 2 are needed, to hold one out.")
    if steps < 1 or batch_size < 1:
        raise UsageError(f"steps={steps}, batch_size={batch_size}: at least one of each is needed.")


def parse_rates(text: str) -> tuple[float, ...]:
    """Learning rates from ``1e-4,1e-3``.

    Raises:
        UsageError: one is no positive number, or there is none.
    """
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise UsageError(f"learning_rates={text!r}: give positive numbers separated by commas, as in 1e-4,1e-3.")
    return rates


def turns(samples: int) -> tuple[int, int]:
    """Into how many folds ``samples`` examples are cut, and how many of them take their turn at being left out."""
    folds = min(FOLDS, samples)
    return folds, min(folds, math.ceil(JUDGED / (samples / folds)))
