"""``adarank``: task vectors without the singular components that make the merge unsure (AdaRank, arXiv 2503.22178).

For the weight of a linear layer with the task matrix theta_i - theta_0 = U_i diag(s_i) V_i^T of expert i

    theta = theta_0 + sum_i lambda_i U_i diag(b_i s_i) V_i^T,    b_i in {0, 1} for each component

and theta_0 + sum_i lambda_i tau_i for every other tensor. A component is kept, b = 1, while its number m is above 0.
These numbers start at ``MARGIN`` for the largest ``density`` of the components and at ``-MARGIN`` for the others, the
coefficients lambda, of every tensor and expert, at ``start``; all follow the gradient of the entropy of the merge's
answers on unlabelled inputs of every task, each with its own head, by Adam (see
:mod:`~unmergeable.merges.adaptation`). Through the step from m to b the gradient goes straight, as if b were the
logistic function of m / ``temperature``:

    d loss / d m_k = lambda s_k u_k^T (d loss / d theta) v_k sigma'(m_k / temperature) / temperature
    d loss / d lambda = sum_k b_k s_k u_k^T (d loss / d theta) v_k

Defaults are the authors' for task vectors from the base in vision. Their other form, with task vectors from the average
of the experts, is not offered. Which matrices are linear layers the network says; they go by names.

``statistics`` is a folder with a subfolder of the b_i for each expert, ``1``, ``2``, …, each under the name of its
weight. Without it nothing is left out: task arithmetic. Needs whole matrices in memory, and their singular value
decompositions take time, once for learning and once more for the matrices that lose a component.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unmergeable.errors import Mismatch, UsageError
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
from unmergeable.merges.blocks import Operand, Scratch, merge_whole
from unmergeable.merges.engine import merge_state_dicts
from unmergeable.merges.learning import (
    LearningInputs,
    LearntMerge,
    gathered_statistics,
    open_statistics,
    require_examples,
)
from unmergeable.merges.models import Model
from unmergeable.merges.task_arithmetic import merge_tensor as merge_plain
from unmergeable.merges.task_vectors import TaskVectors
from unmergeable.merges.variation import Variation
from unmergeable.network.disk_weights import Weights, weights_of
from unmergeable.network.linear_layers import linear_layers
from unmergeable.network.statistics import write_statistics
from unmergeable.network.tasks import Task
from unmergeable.progress import Progress, silent
from unmergeable.registry import Requirements
from unmergeable.threads import one_thread_per_kernel

MARGIN = 0.1
"""How far from being dropped, or kept, a component starts: a hundred of the default steps."""


@dataclass(frozen=True)
class AdaRank(Merge):
    """``density`` is the fraction of singular components that are kept at the start.

    ``heads`` are beginnings of tensor names, separated by blanks: the heads of the tasks, which differ from expert to
    expert and are not merged. The base's stay in the merge. ``examples`` is the most that are read of each data set,
    ``batch_size`` how many of each task one step sees.
    """

    name: ClassVar[str] = "adarank"
    fewest_experts: ClassVar[int] = 1

    statistics: str = ""
    density: float = 1.0
    temperature: float = 10.0
    start: float = 0.3
    learning_rate: float = 1e-3
    steps: int = 10000
    batch_size: int = 16
    heads: str = ""
    examples: int = 1000
    seed: int = 0

    def requirements(self) -> Requirements:
        return Requirements(needs=("base",) if self.statistics else ("base", "data"), accepts=("statistics",))

    def validate(self) -> None:
        require_density(self.density)
        require_finite("start", self.start)
        require_examples(self.examples)
        require_steps(learning_rate=self.learning_rate, steps=self.steps, batch_size=self.batch_size)
        if not 0 < self.temperature < torch.inf:
            raise UsageError(f"temperature={self.temperature}: must be positive.")

    @contextmanager
    def learn(self, inputs: LearningInputs) -> Iterator[LearntMerge]:
        inputs.require_data_for_each(self)
        if self.statistics:
            raise UsageError(f"{self.name}: give either data or statistics, not both.")
        if inputs.base is None:
            raise UsageError(f"{self.name} merges task vectors: name the base that the experts were tuned from.")
        tasks = inputs.tasks(batch_size=self.batch_size, examples=self.examples, seed=self.seed)
        states = [inputs.state(expert) for expert in inputs.experts]
        learnt = learn_masks(
            inputs.network,
            TaskVectors.between(inputs.state(inputs.base), states),
            tasks,
            self,
            start=self.resolve(inputs.coefficients),
            heads=[head_of(self.heads, state) for state in states],
            progress=inputs.progress,
        )
        with gathered_statistics(inputs, lambda _, number, folder: _write(learnt.masks[number], folder)) as folder:
            method = replace(self, statistics=str(folder))
            facts = {**inputs.facts, **learnt.facts}
            yield LearntMerge(method, inputs.coefficients, learnt.vary, facts, learnt.summary)

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        return fill_coefficients(coefficients, default=self.start)

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        experts = len(inputs.operands(inputs.names[0])) - 1
        masks = inputs.statistics or (open_statistics(self.statistics, experts) if self.statistics else ())
        masked = _masked_names(inputs, masks)

        def merge(name: str, operands: Sequence[Operand], scratch: Scratch) -> Tensor:
            coefficients = terms(name).coefficients
            if name not in masked:
                return merge_plain(name, operands, scratch, coefficients=coefficients)
            kernel = partial(_merge_matrices, coefficients=coefficients)
            return merge_whole(name, (*operands, *(mask[name] for mask in masks)), kernel, scratch)

        return merge


def adarank(
    base: Weights,
    experts: Sequence[Weights],
    *,
    network: nn.Module,
    tasks: Sequence[Task],
    coefficients: Sequence[float | None] | None = None,
    density: float = 1.0,
    temperature: float = 10.0,
    start: float = 0.3,
    learning_rate: float = 1e-3,
    steps: int = 10000,
    heads: str = "",
) -> dict[str, Tensor]:
    """Task vectors without the singular components that make the merge unsure (arXiv 2503.22178), in memory.

    Args:
        base: what the experts were fine-tuned from.
        experts: fine-tunes of it.
        network: a live network of their architecture, which has its own weights again afterwards.
        tasks: unlabelled examples for each expert, in their order.
        coefficients: where those of each expert start; None for ``start``.

    The other settings are those of :class:`AdaRank`; errors are those of :func:`learn_masks` and
    :func:`~unmergeable.merges.merge_state_dicts`.
    """
    method = AdaRank("", density, temperature, start, learning_rate, steps, heads=heads)
    method.validate()
    base, states = weights_of(base), [weights_of(expert) for expert in experts]
    learnt = learn_masks(
        network,
        TaskVectors.between(base, states),
        tasks,
        method,
        start=method.resolve(coefficients or [None] * len(states)),
        heads=[head_of(method.heads, state) for state in states],
    )
    return merge_state_dicts(
        base, states, method=method, coefficients=coefficients, vary=learnt.vary, statistics=learnt.masks
    )


@dataclass(frozen=True)
class LearntMasks:
    """What was learnt.

    Attributes:
        masks: for each expert, by the names of weights, 1 for each component that is kept and 0 for the others.
        coefficients: of the experts, by tensor.
        entropies: of the tasks, in nats, on the batches of each step.
    """

    masks: tuple[Mapping[str, Tensor], ...]
    coefficients: Mapping[str, tuple[float, ...]]
    entropies: Entropies

    def vary(self, name: str) -> Variation:
        """The coefficients of a tensor as the engine takes them."""
        return Variation(self.coefficients.get(name))

    @property
    def facts(self) -> dict[str, Any]:
        """For the record: coefficients, entropies, and how many components of each expert are kept, by tensor."""
        return {
            "coefficients": {name: list(values) for name, values in self.coefficients.items()},
            "entropies": [list(values) for values in self.entropies],
            "kept": {name: [int(mask[name].sum()) for mask in self.masks] for name in self.masks[0]},
        }

    @property
    def summary(self) -> str:
        """The mean entropy at the first and the last step, and what is kept of each expert."""
        first, last = fmean(self.entropies[0]), fmean(self.entropies[-1])
        kept = ", ".join(f"{float(torch.cat(list(mask.values())).mean()):.1%}" for mask in self.masks)
        return f"Entropy {first:.3f} -> {last:.3f} nats; components kept {kept}"


def learn_masks(
    network: Any,
    vectors: TaskVectors,
    tasks: Sequence[Task],
    method: AdaRank,
    *,
    start: Sequence[float] | None = None,
    heads: Sequence[Mapping[str, Tensor]] | None = None,
    observe: Observe | None = None,
    progress: Progress = silent,
) -> LearntMasks:
    """Learn which components of each expert to add in each linear layer, and how much of each expert in each tensor.

    Args:
        network: of the experts' architecture; it has its own weights again afterwards.
        vectors: the experts' task vectors.
        tasks: one for each expert, in their order; labels are not read.
        method: where numbers start, steps and rates.
        start: a coefficient per expert; ``method.start`` for all if None.
        heads: for each task tensors by their names on disk that stand in for the merged ones; they are not learnt.
        observe: told of every step.
        progress: told of the steps done.

    Raises:
        UsageError: another number of tasks, heads or coefficients than of experts; nothing but heads, or no linear
            layer, to learn.
        Mismatch: a head that the network does not have.
        BadInput: a task has no examples, or answers that are not finite.
    """
    count = len(vectors.vectors)
    start = [method.start] * count if start is None else start
    heads = [{} for _ in tasks] if heads is None else heads
    require_one_each(method.name, count, tasks=len(tasks), heads=len(heads), coefficients=len(start))
    names = learnt_names(method.name, vectors.names, vectors.base, heads)
    layers = [layer.name for layer in linear_layers(network) if layer.name in names]
    if not layers:
        raise UsageError(f"{method.name}: no linear layer whose weight is a tensor of its own; use adamerging.")
    numbers = _Numbers.begun(vectors, names, layers, start, method)
    adaptation = Adaptation(method.name, numbers.all, numbers.merged, numbers.gradients)
    entropies = adaptation.follow_entropy(
        network,
        tasks,
        heads,
        learning_rate=method.learning_rate,
        steps=method.steps,
        observe=observe,
        progress=progress,
    )
    masks = tuple({name: (m[i] > 0).float() for name, m in numbers.margins.items()} for i in range(count))
    return LearntMasks(masks, {name: numbers.used(name) for name in vectors.names}, entropies)


@dataclass(frozen=True)
class Components:
    """A task matrix: the columns of ``left`` times ``values`` times the rows of ``right``, the largest value first."""

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, task_matrix: Tensor) -> Components:
        """Of [rows, columns]; the same bits wherever it is taken of the same matrix."""
        with one_thread_per_kernel():
            return cls(*torch.linalg.svd(task_matrix, full_matrices=False))

    def subtract(self, total: Tensor, *, dropped: Tensor, factor: float) -> None:
        """Take ``factor`` times the components that are dropped, bool [components], from ``total``, in its memory."""
        total.addmm_(self.left[:, dropped] * self.values[dropped], self.right[dropped], alpha=-factor)

    def slopes(self, gradient: Tensor) -> Tensor:
        """How a loss of this gradient by the matrix grows with each component, float64 [components]."""
        along = ((self.left.T @ gradient.to(self.left)) * self.right).sum(dim=1)
        return (along * self.values).double()


@dataclass(frozen=True)
class _Numbers:
    """What is learnt, and the merge it makes.

    Attributes:
        rows: of the tensors that are learnt, in ``coefficients``, [tensors, experts].
        margins: of linear layers, [experts, components]: a component is kept while its margin is positive.
        components: of linear layers, for each expert.
        temperature: what margins are divided by on the way back.
        buffer: the merged tensors.
    """

    vectors: TaskVectors
    rows: Mapping[str, int]
    coefficients: Tensor
    margins: Mapping[str, Tensor]
    components: Mapping[str, tuple[Components, ...]]
    temperature: float
    buffer: dict[str, Tensor]

    @classmethod
    def begun(
        cls, vectors: TaskVectors, names: Sequence[str], layers: Sequence[str], start: Sequence[float], method: AdaRank
    ) -> _Numbers:
        rows = {name: row for row, name in enumerate(names)}
        coefficients = torch.tensor([list(start)] * len(names), dtype=torch.float64)
        components = {name: tuple(Components.of(vector[name]) for vector in vectors.vectors) for name in layers}
        margins = {}
        for name, (first, *_) in components.items():
            size = len(first.values)
            margin = torch.full((len(start), size), MARGIN, dtype=torch.float64)
            margin[:, int(method.density * size) :] = -MARGIN
            margins[name] = margin
        numbers = cls(vectors, rows, coefficients, margins, components, method.temperature, {})
        numbers.buffer.update(vectors.merged(numbers.used))
        return numbers

    @property
    def all(self) -> list[Tensor]:
        return [self.coefficients, *self.margins.values()]

    def used(self, name: str) -> tuple[float, ...]:
        """The coefficients of a tensor; 0 for one of a head."""
        if name not in self.rows:
            return (0.0,) * len(self.vectors.vectors)
        return tuple(self.coefficients[self.rows[name]].tolist())

    def merged(self) -> Mapping[str, Tensor]:
        self.vectors.merged(self.used, into=self.buffer)
        for name, margins in self.margins.items():
            for factor, margin, own in zip(self.used(name), margins, self.components[name], strict=True):
                own.subtract(self.buffer[name], dropped=margin <= 0, factor=factor)
        return self.buffer

    def gradients(self, of_weights: Mapping[str, Tensor]) -> list[Tensor]:
        """The loss's, by everything in ``all``."""
        by_coefficient = torch.zeros_like(self.coefficients)
        by_margin = {name: torch.zeros_like(margins) for name, margins in self.margins.items()}
        for name, row in self.rows.items():
            for expert, vector in enumerate(self.vectors.vectors):
                if name not in self.margins:
                    flat = of_weights[name].reshape(-1)
                    by_coefficient[row, expert] = torch.dot(flat, vector[name].reshape(-1).to(flat)).double()
                    continue
                slopes, margin = self.components[name][expert].slopes(of_weights[name]), self.margins[name][expert]
                by_coefficient[row, expert] = slopes[margin > 0].sum()
                soft = torch.sigmoid(margin / self.temperature)
                straight = soft * (1 - soft) / self.temperature
                by_margin[name][expert] = self.coefficients[row, expert] * slopes * straight
        return [by_coefficient, *by_margin.values()]


def _merge_matrices(tensors: list[Tensor], *, coefficients: Sequence[float]) -> Tensor:
    count = len(coefficients)
    base, experts, masks = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
    task_matrices = [expert.sub_(base) for expert in experts]
    for task_matrix, mask, coefficient in zip(task_matrices, masks, coefficients, strict=True):
        dropped = mask < 0.5
        lost = Components.of(task_matrix) if bool(dropped.any()) and coefficient else None
        base.add_(task_matrix, alpha=coefficient)
        if lost is not None:
            lost.subtract(base, dropped=dropped, factor=coefficient)
    return base


def _write(masks: Mapping[str, Tensor], folder: Path) -> str:
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    facts = {"statistics": "singular components of task matrices that are kept"}
    return write_statistics(folder, shapes, ((name, masks[name]) for name in sorted(masks)), facts=facts)


def _masked_names(inputs: Inputs, masks: Sequence[Model]) -> frozenset[str]:
    """The tensors that have masks.

    Raises:
        Mismatch: they do not fit the weights, or each other.
    """
    found = frozenset(name for mask in masks for name in mask)
    remedy = "learn them from the experts that are merged."
    for name in sorted(found):
        shape = inputs.operands(name)[0].shape if name in inputs.names else ()
        for mask in masks:
            if len(shape) != 2 or name not in mask or mask[name].shape != (min(shape),):
                label = next(iter(mask.values())).label if mask else "the masks of an expert"
                raise Mismatch(f"{name}: the mask in {label} is not one of the components of {list(shape)}; {remedy}")
    return found
