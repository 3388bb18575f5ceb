"""``fisher``: average each weight by how much it matters to each expert (Fisher merging, arXiv 2111.09832).

With F_i the diagonal Fisher information of expert i on its own data and lambda_i its coefficient, per weight:

    theta = sum_i w_i theta_i / sum_i w_i,    w_i = lambda_i F_i / |F_i|

|F_i| is the norm of all of F_i (``normalize``), so that an expert that is less sure of its data has as much of a say.
Where all F_i are nearly 0 nobody has an opinion. As in the authors' code F_1 is then at least ``floor`` (before it is
normalised), and the first expert, theirs is the target model, decides; ``favor_first=false`` lifts all F_i instead,
which averages.

``statistics`` is a folder with a subfolder of F_i for each expert, ``1``, ``2``, …, under the names and in the shapes
of the weights. Without it every F_i is 1 and the merge a weighted average, which the authors call isotropic.

From data, F_i is gathered as

    F = mean over examples x of E_{y ~ p(y|x)} [(d log p(y|x) / d theta)^2]

where ``labels`` says where y comes from:

=============  =====================================================================================================
``expected``   the expectation itself, one backward pass per class, as the authors do; for classifiers of few classes
``sampled``    one y drawn from the network's own p(y|x): unbiased, one backward pass per example
``empirical``  the label of the data: the empirical Fisher, another quantity, which vanishes where the network is sure
=============  =====================================================================================================

A text has a y at every place, drawn given the true text before it; log p is their sum. Examples are taken one by one,
since the mean of squares is not the square of a mean; memory holds one more copy of the network and its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from unmergeable.checkpoint.disk_names import to_disk_names
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.merges.base import Inputs, TensorMerge, TermsOf
from unmergeable.merges.blocks import BLOCK_ELEMENTS, Operand, Scratch, merge_blocks, weighted_sum
from unmergeable.merges.engine import merge_state_dicts
from unmergeable.merges.learning import BATCH_SIZE, LearningInputs, StatisticsMerge, floating_shapes, require_examples
from unmergeable.merges.linear import merge_tensor as average_tensor
from unmergeable.merges.models import Model
from unmergeable.network.disk_weights import Weights
from unmergeable.network.statistics import write_statistics
from unmergeable.network.tasks import Prediction, Task, device_of
from unmergeable.progress import Progress, silent
from unmergeable.randomness import Stream

Labels = Literal["sampled", "expected", "empirical"]


@dataclass(frozen=True)
class Fisher(StatisticsMerge):
    """``labels``, ``examples`` and ``seed`` say how F_i is estimated where data are given instead of statistics.

    ``labels`` are ``sampled`` from the network's own predictions, ``expected`` over all of them, or the data's own,
    ``empirical``. ``examples`` is the most that are read of each data set.
    """

    name: ClassVar[str] = "fisher"

    normalize: bool = True
    favor_first: bool = True
    floor: float = 1e-6
    labels: Labels = "sampled"
    examples: int = 256
    seed: int = 0

    def validate(self) -> None:
        if not self.floor > 0:
            raise UsageError(f"floor={self.floor}: must be positive, or weights without information have no average.")
        require_examples(self.examples)

    def gather(self, inputs: LearningInputs, number: int, folder: Path) -> str:
        is_labelled = self.labels == "empirical"
        task = inputs.task(
            number, batch_size=BATCH_SIZE, examples=self.examples, seed=self.seed, is_labelled=is_labelled
        )
        information = diagonal_fisher(
            inputs.network, task, labels=self.labels, seed=self.seed, progress=inputs.progress
        )
        shapes = floating_shapes(inputs.experts[number])
        # What the network does not have it does not use.
        tensors = ((name, information.get(name, torch.zeros(shapes[name]))) for name in sorted(shapes))
        facts = {"statistics": "diagonal Fisher information", "labels": self.labels, "data": task.name}
        return write_statistics(folder, shapes, tensors, facts=facts)

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        experts = len(inputs.operands(inputs.names[0]))
        fishers = self.statistics_of(inputs)
        if not fishers:
            return partial(_isotropic, terms=terms)
        for name in inputs.names:
            _require_alike(name, inputs.operands(name)[0], fishers)
        norms = [_norm(statistic, inputs.names) for statistic in fishers] if self.normalize else [1.0] * experts

        def merge(name: str, operands: Sequence[Operand], scratch: Scratch) -> Tensor:
            scales = [value / norm for value, norm in zip(terms(name).coefficients, norms, strict=True)]
            floors = [self.floor] + [0.0 if self.favor_first else self.floor] * (experts - 1)
            statistics = [statistic[name] for statistic in fishers]
            return merge_tensor(name, operands, statistics, scratch, scales=scales, floors=floors)

        return merge


def fisher(
    base: Weights | None,
    experts: Sequence[Weights],
    *,
    information: Sequence[Mapping[str, Tensor]],
    coefficients: Sequence[float | None] | None = None,
    normalize: bool = True,
    favor_first: bool = True,
    floor: float = 1e-6,
) -> dict[str, Tensor]:
    """Average each weight by how much it matters to each expert (Fisher merging, arXiv 2111.09832), in memory.

    ``information`` is the diagonal Fisher information of each expert, by the names and in the shapes of the weights, as
    :func:`diagonal_fisher` gathers it. The other settings are those of :class:`Fisher`; the rest is as for
    :func:`~unmergeable.merges.merge_state_dicts`.
    """
    method = Fisher(normalize=normalize, favor_first=favor_first, floor=floor)
    return merge_state_dicts(base, experts, method=method, coefficients=coefficients, statistics=information)


def diagonal_fisher(
    network: Any, task: Task, *, labels: Labels = "sampled", seed: int = 0, progress: Progress = silent
) -> dict[str, Tensor]:
    """The diagonal Fisher information of every weight, float32, by its name on disk.

    Args:
        network: live, in evaluation mode; its gradients are used and left empty.
        task: the examples, and how the output is read.
        labels: where the labels come from, as above.
        seed: of the labels drawn.
        progress: told of every example.

    Raises:
        UsageError: ``labels`` is none of these.
        BadInput: empirical labels are asked for and missing; no example; a gradient that is not finite.
    """
    if labels not in get_args(Labels):
        raise UsageError(f"labels={labels}: must be one of {', '.join(get_args(Labels))}.")
    parameters: dict[str, Tensor] = dict(network.state_dict(keep_vars=True))
    # Names that share a weight share its sum.
    sums = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in parameters.values() if p.is_floating_point()}
    learnt = {id(p): p for p in parameters.values() if p.requires_grad}
    device, count = device_of(network), 0
    for batch in task.batches:
        for example in batch.singles():
            prediction = task.predict(network, example.to(device))
            stream = Stream.from_seed(seed).child(f"fisher.{count}")
            for log_likelihood, weight in _log_likelihoods(prediction, labels, stream):
                network.zero_grad(set_to_none=True)
                log_likelihood.backward(retain_graph=labels == "expected")
                for key, parameter in learnt.items():
                    if parameter.grad is not None:
                        gradient = parameter.grad.float()
                        sums[key].addcmul_(gradient, gradient, value=weight)
            count += 1
            progress(f"Fisher information: {task.name}", count, 0, "examples")  # of how many is not known
    network.zero_grad(set_to_none=True)
    if count == 0:
        raise BadInput(f"{task.name}: no examples to take the Fisher information of; give some.")
    information = to_disk_names(network, {n: sums[id(p)].div(count) for n, p in parameters.items() if id(p) in sums})
    _require_finite(information, task)
    return information


def _log_likelihoods(prediction: Prediction, labels: Labels, stream: Stream) -> Iterator[tuple[Tensor, float]]:
    log_probabilities = functional.log_softmax(prediction.logits.float(), dim=-1)
    if labels == "empirical":
        yield _chosen(log_probabilities, prediction.require_targets()), 1.0
    elif labels == "sampled":
        yield _chosen(log_probabilities, sample_classes(log_probabilities.detach(), stream)), 1.0
    else:
        if len(log_probabilities) > 1:
            raise UsageError("labels=expected needs one choice per example, a text has many; use labels=sampled.")
        for log_probability in log_probabilities[0]:
            yield log_probability, float(log_probability.detach().exp())


def sample_classes(log_probabilities: Tensor, stream: Stream) -> Tensor:
    """A class for each row, drawn with its probability: [choices, classes] to int64 [choices]."""
    cumulative = log_probabilities.double().exp().cumsum(dim=-1)
    drawn = torch.from_numpy(stream.uniform(len(cumulative), 1)).to(cumulative)
    # The last sum may fall short of 1 by rounding, and a number above it would draw a class that does not exist.
    return torch.searchsorted(cumulative, drawn * cumulative[:, -1:]).squeeze(-1)


def _chosen(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    return log_probabilities.gather(-1, classes.unsqueeze(-1)).sum()


def _require_finite(information: Mapping[str, Tensor], task: Task) -> None:
    for name, tensor in information.items():
        if not bool(tensor.isfinite().all()):
            raise BadInput(
                f"{name}: its Fisher information on {task.name} is not finite; use the network in float32, or look for "
                "examples that break it."
            )


def merge_tensor(
    name: str,
    experts: Sequence[Operand],
    fishers: Sequence[Operand],
    scratch: Scratch,
    *,
    scales: Sequence[float],
    floors: Sequence[float],
) -> Tensor:
    """``sum_i w_i experts[i] / sum_i w_i`` with ``w_i = scales[i] * max(fishers[i], floors[i])``."""
    kernel = partial(_merge_block, scales=scales, floors=floors)
    return merge_blocks(name, (*experts, *fishers), kernel, scratch)


def _merge_block(
    blocks: list[Tensor], spare: list[Tensor], *, scales: Sequence[float], floors: Sequence[float]
) -> Tensor:
    # The first expert and what moves the others away from it: where all agree nothing is rounded.
    experts, fishers = blocks[: len(scales)], blocks[len(scales) :]
    for fisher, scale, floor in zip(fishers, scales, floors, strict=True):
        fisher.clamp_(min=floor).mul_(scale)
    (first, *others), (total, *weights) = experts, fishers
    for other, weight in zip(others, weights, strict=True):
        other.sub_(first).mul_(weight)
        total.add_(weight)
    return first.add_(weighted_sum(others, [1.0] * len(others)).div_(total))


def _isotropic(name: str, operands: Sequence[Operand], scratch: Scratch, *, terms: TermsOf) -> Tensor:
    weights = terms(name).coefficients
    return average_tensor(name, operands, scratch, weights=weights, divisor=sum(weights))


def _require_alike(name: str, weight: Operand, fishers: Sequence[Model]) -> None:
    remedy = "gather them from the experts that are merged."
    for fisher in fishers:
        label = next(iter(fisher.values())).label
        if name not in fisher:
            raise Mismatch(f"{name}: not in {label}; {remedy}")
        ours, theirs = list(weight.shape), list(fisher[name].shape)
        if ours != theirs:
            raise Mismatch(f"{name}: {ours} in {weight.label} but {theirs} in {label}; {remedy}")


def _norm(fisher: Model, names: Sequence[str]) -> float:
    blocks = (block for name in names for block in fisher[name].read(BLOCK_ELEMENTS))
    norm = math.sqrt(sum(float(block.double().square().sum()) for block in blocks))
    if not 0 < norm < math.inf:
        label = next(iter(fisher.values())).label
        raise BadInput(f"{label}: the Fisher information has the norm {norm}; gather it again, on other data.")
    return norm
