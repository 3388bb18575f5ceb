"""``adamerging``: task vectors, scaled so that the merge is sure of its answers (AdaMerging, arXiv 2310.02575).

    theta^l = theta_0^l + sum_i lambda_i^l tau_i^l

The coefficients start at ``start`` and follow the gradient of the entropy of the merge's predictions on unlabelled
inputs of every task, each with its own head, by Adam. ``granularity=layer`` learns one for every tensor l and expert i,
which is what the authors' code calls a layer; ``task`` one for every expert. As there, they are kept in [0, 1].

``task_vectors=ties`` is AdaMerging++: the tau_i are first trimmed to ``density``, and what has the sign that lost the
election of ``ties`` is set to 0. They are then summed, not averaged.

How a step is taken is told in :mod:`~unmergeable.merges.adaptation`; the gradient is

    d loss / d lambda_i^l = < d loss / d theta^l, tau_i^l >

so that beside the task vectors memory holds one merged network and its gradient, for any number of coefficients.
Without data the coefficients stay at ``start``: task arithmetic, or TIES with sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unmergeable.errors import UsageError
from unmergeable.merges.adaptation import (
    Adaptation,
    Entropies,
    Observe,
    head_of,
    learnt_names,
    require_one_each,
    require_steps,
)
from unmergeable.merges.base import (
    Inputs,
    Merge,
    TensorMerge,
    TermsOf,
    fill_coefficients,
    require_density,
    require_finite,
)
from unmergeable.merges.blocks import Operand, Scratch, merge_blocks, weighted_sum
from unmergeable.merges.election import keep_elected
from unmergeable.merges.engine import merge_state_dicts
from unmergeable.merges.learning import LearningInputs, LearntMerge, require_examples
from unmergeable.merges.task_arithmetic import merge_tensor as merge_plain
from unmergeable.merges.task_vectors import TaskVectors
from unmergeable.merges.ties import global_thresholds
from unmergeable.merges.variation import Variation
from unmergeable.network.disk_weights import Weights, weights_of
from unmergeable.network.tasks import Task
from unmergeable.progress import Progress, silent
from unmergeable.registry import Requirements

Granularity = Literal["layer", "task"]
Kind = Literal["plain", "ties"]


@dataclass(frozen=True)
class AdaMerging(Merge):
    """Defaults are the authors'.

    ``heads`` are beginnings of tensor names, separated by blanks: the heads of the tasks, which differ from expert to
    expert and are not merged. The base's stay in the merge. ``examples`` is the most that are read of each data set,
    ``batch_size`` how many of each task one step sees.
    """

    name: ClassVar[str] = "adamerging"
    fewest_experts: ClassVar[int] = 1

    granularity: Granularity = "layer"
    task_vectors: Kind = "plain"
    density: float = 0.2
    start: float = 0.3
    learning_rate: float = 1e-3
    steps: int = 500
    batch_size: int = 16
    heads: str = ""
    examples: int = 1000
    seed: int = 0

    def requirements(self) -> Requirements:
        return Requirements(needs=("base", "data"))

    def validate(self) -> None:
        super().validate()
        require_density(self.density)
        require_finite("start", self.start)
        require_examples(self.examples)
        require_steps(learning_rate=self.learning_rate, steps=self.steps, batch_size=self.batch_size)

    @contextmanager
    def learn(self, inputs: LearningInputs) -> Iterator[LearntMerge]:
        inputs.require_data_for_each(self)
        if inputs.base is None:
            raise UsageError("adamerging merges task vectors: name the base that the experts were tuned from.")
        tasks = inputs.tasks(batch_size=self.batch_size, examples=self.examples, seed=self.seed)
        states = [inputs.state(expert) for expert in inputs.experts]
        learnt = learn_coefficients(
            inputs.network,
            TaskVectors.between(inputs.state(inputs.base), states),
            tasks,
            self,
            start=self.resolve(inputs.coefficients),
            heads=[head_of(self.heads, state) for state in states],
            progress=inputs.progress,
        )
        facts = {
            **inputs.facts,
            "coefficients": {name: list(values) for name, values in learnt.coefficients.items()},
            "entropies": [list(values) for values in learnt.entropies],
        }
        yield LearntMerge(self, inputs.coefficients, learnt.vary, facts, learnt.summary)

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        return fill_coefficients(coefficients, default=self.start)

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        if self.task_vectors == "plain":
            return partial(_merge_plain, terms=terms)
        experts = len(inputs.operands(inputs.names[0])) - 1
        thresholds = global_thresholds(inputs, (self.density,) * experts)

        def merge(name: str, operands: Sequence[Operand], scratch: Scratch) -> Tensor:
            coefficients = terms(name).coefficients
            return merge_tensor(name, operands, scratch, coefficients=coefficients, thresholds=thresholds)

        return merge


def adamerging(
    base: Weights,
    experts: Sequence[Weights],
    *,
    network: nn.Module,
    tasks: Sequence[Task],
    coefficients: Sequence[float | None] | None = None,
    granularity: Granularity = "layer",
    task_vectors: Kind = "plain",
    density: float = 0.2,
    start: float = 0.3,
    learning_rate: float = 1e-3,
    steps: int = 500,
    heads: str = "",
) -> dict[str, Tensor]:
    """Task arithmetic whose coefficients follow the entropy of the merge's answers (arXiv 2310.02575), in memory.

    Args:
        base: what the experts were fine-tuned from.
        experts: fine-tunes of it.
        network: a live network of their architecture, which has its own weights again afterwards.
        tasks: unlabelled examples for each expert, in their order.
        coefficients: where those of each expert start; None for ``start``.

    The other settings are those of :class:`AdaMerging`; errors are those of :func:`learn_coefficients` and
    :func:`~unmergeable.merges.merge_state_dicts`.
    """
    method = AdaMerging(granularity, task_vectors, density, start, learning_rate, steps, heads=heads)
    method.validate()
    base, states = weights_of(base), [weights_of(expert) for expert in experts]
    learnt = learn_coefficients(
        network,
        TaskVectors.between(base, states),
        tasks,
        method,
        start=method.resolve(coefficients or [None] * len(states)),
        heads=[head_of(method.heads, state) for state in states],
    )
    return merge_state_dicts(base, states, method=method, coefficients=coefficients, vary=learnt.vary)


@dataclass(frozen=True)
class LearntCoefficients:
    """``coefficients`` of the experts by tensor; ``entropies`` of the tasks, in nats, on the batches of each step."""

    coefficients: Mapping[str, tuple[float, ...]]
    entropies: Entropies

    def vary(self, name: str) -> Variation:
        """The coefficients of a tensor as the engine takes them."""
        return Variation(self.coefficients.get(name))

    @property
    def summary(self) -> str:
        """The mean entropy at the first and the last step, and the mean coefficient of each expert."""
        first, last = fmean(self.entropies[0]), fmean(self.entropies[-1])
        means = ", ".join(f"{fmean(values):.3f}" for values in zip(*self.coefficients.values(), strict=True))
        return f"Entropy {first:.3f} -> {last:.3f} nats; mean coefficients {means}"


def learn_coefficients(
    network: Any,
    task_vectors: TaskVectors,
    tasks: Sequence[Task],
    method: AdaMerging,
    *,
    start: Sequence[float] | None = None,
    heads: Sequence[Mapping[str, Tensor]] | None = None,
    observe: Observe | None = None,
    progress: Progress = silent,
) -> LearntCoefficients:
    """Learn how much of each expert to add in each tensor.

    Args:
        network: of the experts' architecture; it has its own weights again afterwards.
        task_vectors: of the experts, plain: ``method`` says whether signs are elected.
        tasks: one for each expert, in their order; labels are not read.
        method: granularity, steps and rates.
        start: a coefficient per expert; ``method.start`` for all if None.
        heads: for each task tensors by their names on disk that stand in for the merged ones; they are not learnt.
        observe: told of every step.
        progress: told of the steps done.

    Raises:
        UsageError: another number of tasks, heads or coefficients than of experts; a coefficient that starts outside
            [0, 1]; nothing but heads.
        Mismatch: a head that the network does not have.
        BadInput: a task has no examples, or answers that are not finite.
    """
    vectors = task_vectors if method.task_vectors == "plain" else task_vectors.elected(method.density)
    count = len(vectors.vectors)
    start = [method.start] * count if start is None else start
    heads = [{} for _ in tasks] if heads is None else heads
    require_one_each("adamerging", count, tasks=len(tasks), heads=len(heads), coefficients=len(start))
    if not all(0 <= value <= 1 for value in start):
        raise UsageError(f"adamerging: the coefficients {tuple(start)} must start in [0, 1], where they are kept.")
    learnt = learnt_names("adamerging", vectors.names, vectors.base, heads)
    rows = {name: number if method.granularity == "layer" else 0 for number, name in enumerate(learnt)}
    coefficients = torch.tensor([start] * (max(rows.values()) + 1), dtype=torch.float64)

    def used(name: str) -> tuple[float, ...]:
        return tuple(coefficients[rows[name]].clamp(0, 1).tolist()) if name in rows else (0.0,) * count

    merge = vectors.merged(used)
    adaptation = Adaptation(
        "adamerging",
        [coefficients],
        lambda: vectors.merged(used, into=merge),
        lambda gradients: [_gradient(gradients, vectors, rows, coefficients)],
    )
    entropies = adaptation.follow_entropy(
        network,
        tasks,
        heads,
        learning_rate=method.learning_rate,
        steps=method.steps,
        observe=observe,
        progress=progress,
    )
    return LearntCoefficients({name: used(name) for name in vectors.names}, entropies)


def _gradient(
    gradients: Mapping[str, Tensor], vectors: TaskVectors, rows: Mapping[str, int], coefficients: Tensor
) -> Tensor:
    """Of the loss by each coefficient, [rows, experts]; 0 where one is held at the end of its range."""
    gradient = torch.zeros_like(coefficients)
    for name, row in rows.items():
        flat = gradients[name].reshape(-1)
        for expert, vector in enumerate(vectors.vectors):
            gradient[row, expert] += torch.dot(flat, vector[name].reshape(-1).to(flat)).double()
    # As through torch.clamp: nothing comes back from outside the range.
    return gradient.where((coefficients >= 0) & (coefficients <= 1), 0.0)


def merge_tensor(
    name: str,
    operands: Sequence[Operand],
    scratch: Scratch,
    *,
    coefficients: Sequence[float],
    thresholds: Sequence[float],
) -> Tensor:
    """``base + sum_i coefficients[i] * tau_i`` with the tau_i trimmed below ``thresholds`` and of the elected sign."""
    kernel = partial(_merge_block, coefficients=coefficients, thresholds=thresholds)
    return merge_blocks(name, operands, kernel, scratch, spare=1)


def _merge_plain(name: str, operands: Sequence[Operand], scratch: Scratch, *, terms: TermsOf) -> Tensor:
    return merge_plain(name, operands, scratch, coefficients=terms(name).coefficients)


def _merge_block(
    blocks: list[Tensor], spare: list[Tensor], *, coefficients: Sequence[float], thresholds: Sequence[float]
) -> Tensor:
    base, *experts = blocks
    task_vectors = [expert.sub_(base) for expert in experts]
    keep_elected(task_vectors, spare[0], thresholds)
    return base.add_(weighted_sum(task_vectors, coefficients))
