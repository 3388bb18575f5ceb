"""``regmean``: the linear maps that best repeat what each expert's do on its own inputs (RegMean, arXiv 2212.09849).

For a linear layer y = W x with G_i = X_i^T X_i / rows of the inputs X_i of expert i on its own data:

    W = argmin sum_i c_i |X_i W^T - X_i W_i^T|^2 / rows_i,    W^T = (sum_i c_i G_i)^-1 sum_i c_i G_i W_i^T

The off-diagonal entries of G_i are first multiplied by ``alpha``, as the paper proposes: layers are fitted one by one,
and inputs change when the layers before them do. Every other tensor is averaged, sum_i c_i theta_i / sum_i c_i.

Inputs that are always 0 leave their weights undetermined; a ridge of ``RIDGE`` times the mean of the diagonal, towards
that average, decides them, and makes the matrix invertible for any alpha. It is solved in float64.

``statistics`` is a folder with a subfolder of G_i for each expert, ``1``, ``2``, …. ``NAME/1`` belongs to the axis 1 of
the tensor NAME, which is where ``nn.Linear`` has its inputs. Without it every G_i is the identity: a weighted average.

From data, all layers are captured in one pass when their matrices fit ``MEMORY_BUDGET``; otherwise in as few passes as
do. Dividing by the rows, tokens or patches, makes experts that saw more data weigh no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.merges.base import Inputs, TensorMerge, TermsOf
from unmergeable.merges.blocks import Operand, Scratch, merge_whole, weighted_sum
from unmergeable.merges.engine import merge_state_dicts
from unmergeable.merges.learning import BATCH_SIZE, LearningInputs, StatisticsMerge, require_examples
from unmergeable.merges.linear import merge_tensor as average_tensor
from unmergeable.merges.models import Model
from unmergeable.network.disk_weights import Weights
from unmergeable.network.encoding import EncodedBatch, grouped
from unmergeable.network.linear_layers import MEMORY_BUDGET, LinearLayer, linear_layers
from unmergeable.network.statistics import write_statistics
from unmergeable.network.tasks import Task, answer, device_of
from unmergeable.progress import Progress, silent

RIDGE = 1e-6
"""Small against an input that occurs, large against the rounding (1e-7) of the float32 in which G_i are summed."""


@dataclass(frozen=True)
class RegMean(StatisticsMerge):
    """``examples`` is the most that are read of each data set where data are given instead of statistics."""

    name: ClassVar[str] = "regmean"

    alpha: float = 0.9
    examples: int = 256
    seed: int = 0

    def validate(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha={self.alpha}: must lie in [0, 1], what is kept of the off-diagonal entries.")
        require_examples(self.examples)

    def gather(self, inputs: LearningInputs, number: int, folder: Path) -> str:
        shapes = {layer.key: (layer.inputs, layer.inputs) for layer in linear_layers(inputs.network)}
        task = inputs.task(number, batch_size=BATCH_SIZE, examples=self.examples, seed=self.seed)
        grams = gather_input_grams(inputs.network, task, progress=inputs.progress)
        facts = {"statistics": "Gram matrices of the inputs of linear layers", "data": task.name}
        return write_statistics(folder, shapes, grams, facts=facts)

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        grams = self.statistics_of(inputs)
        axes = _axes(grams, inputs)

        def merge(name: str, operands: Sequence[Operand], scratch: Scratch) -> Tensor:
            coefficients = terms(name).coefficients
            if name not in axes:
                return average_tensor(name, operands, scratch, weights=coefficients, divisor=sum(coefficients))
            return merge_tensor(
                name,
                operands,
                [gram[f"{name}/{axes[name]}"] for gram in grams],
                scratch,
                axis=axes[name],
                coefficients=coefficients,
                alpha=self.alpha,
            )

        return merge


def regmean(
    base: Weights | None,
    experts: Sequence[Weights],
    *,
    grams: Sequence[Mapping[str, Tensor]],
    coefficients: Sequence[float | None] | None = None,
    alpha: float = 0.9,
) -> dict[str, Tensor]:
    """The linear maps that best repeat what each expert's do on its own inputs (arXiv 2212.09849), in memory.

    ``grams`` are for each expert the Gram matrices of its linear layers, ``dict(gather_input_grams(network, task))``.
    ``alpha`` is a setting of :class:`RegMean`; the rest is as for :func:`~unmergeable.merges.merge_state_dicts`.
    """
    return merge_state_dicts(base, experts, method=RegMean(alpha=alpha), coefficients=coefficients, statistics=grams)


@torch.no_grad()
def gather_input_grams(
    network: Any, task: Task, *, memory_budget: int = MEMORY_BUDGET, progress: Progress = silent
) -> Iterator[tuple[str, Tensor]]:
    """Key and Gram matrix, float32 [inputs, inputs], of every linear layer, in the order of :func:`linear_layers`.

    Only the batches of the task matter, not how its output is read. Padding does not count. Each matrix is the
    caller's to keep or drop before the next is asked for.

    Raises:
        BadInput: there are no examples, the network does not take them, or its activations are not finite.
    """
    layers = linear_layers(network)
    for group in grouped(layers, lambda layer: 4 * layer.inputs**2, memory_budget):
        yield from _gather(network, task, group, progress).items()


def _gather(network: Any, task: Task, layers: Sequence[LinearLayer], progress: Progress) -> dict[str, Tensor]:
    device = device_of(network)
    sums = {layer.key: torch.zeros(layer.inputs, layer.inputs, device=device) for layer in layers}
    rows = dict.fromkeys(sums, 0)

    def add(key: str, inputs: Tensor) -> None:
        sums[key].addmm_(inputs.T, inputs)
        rows[key] += len(inputs)

    seen = 0
    for batch in task.batches:
        with _observed_inputs(layers, batch, add):
            answer(network, batch.to(device))  # whatever it is: no head is needed
        seen += len(batch)
        progress(f"inputs of layers: {task.name}", seen, 0, "examples")  # of how many is not known
    if seen == 0:
        raise BadInput(f"{task.name}: no examples to send through the network; give some.")
    for key, total in sums.items():
        total.div_(max(1, rows[key]))  # a layer that is never called has no inputs
        if not bool(total.isfinite().all()):
            raise BadInput(f"{key.rpartition('/')[0]}: its inputs on {task.name} are not finite; use float32.")
    return sums


@contextmanager
def _observed_inputs(
    layers: Sequence[LinearLayer], batch: EncodedBatch, observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Inside, ``observe`` is given the key and the inputs, float32 [rows, inputs], of every layer that is called."""
    with ExitStack() as hooks:
        for layer in layers:
            hook = layer.module.register_forward_pre_hook(
                lambda module, arguments, key=layer.key: observe(key, batch.visible(arguments[0]).float())
            )
            hooks.callback(hook.remove)
        yield


def merge_tensor(
    name: str,
    experts: Sequence[Operand],
    grams: Sequence[Operand],
    scratch: Scratch,
    *,
    axis: int,
    coefficients: Sequence[float],
    alpha: float,
) -> Tensor:
    """The RegMean merge of matrices whose ``axis`` meets inputs with these Gram matrices."""
    kernel = partial(_merge_matrices, axis=axis, coefficients=coefficients, alpha=alpha)
    return merge_whole(name, (*experts, *grams), kernel, scratch)


def fit_matrices(matrices: Sequence[Tensor], grams: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """``(sum c_i G_i)^-1 sum c_i G_i M_i`` with the ridge, in float64.

    Args:
        matrices: the M_i, each [inputs, outputs].
        grams: the G_i, each [inputs, inputs], symmetric and positive semidefinite.
        coefficients: the c_i.
    """
    average = weighted_sum([matrix.clone() for matrix in matrices], coefficients) / sum(coefficients)
    # Only what departs from the average is solved for: it is what the ridge pulls at, and 0 where the experts agree.
    total, moments = torch.zeros_like(grams[0]), torch.zeros_like(average)
    for coefficient, gram, matrix in zip(coefficients, grams, matrices, strict=True):
        total.add_(gram, alpha=coefficient)
        moments.addmm_(gram, matrix - average, alpha=coefficient)
    mean = float(total.diagonal().mean())
    total.diagonal().add_(RIDGE * mean if mean > 0 else 1.0)  # without any input the average is all there is
    fitted: Tensor = average + torch.linalg.solve(total, moments)
    return fitted


def _merge_matrices(tensors: list[Tensor], *, axis: int, coefficients: Sequence[float], alpha: float) -> Tensor:
    count = len(coefficients)
    matrices = [(tensor if axis == 0 else tensor.T).double() for tensor in tensors[:count]]
    grams = [_off_diagonal_scaled(gram.double(), alpha) for gram in tensors[count:]]
    merged = fit_matrices(matrices, grams, coefficients)
    return merged if axis == 0 else merged.T


def _off_diagonal_scaled(gram: Tensor, alpha: float) -> Tensor:
    diagonal = gram.diagonal().clone()
    scaled = gram * alpha
    scaled.diagonal().copy_(diagonal)
    return scaled


def _axes(grams: Sequence[Model], inputs: Inputs) -> dict[str, int]:
    """Of every tensor that is fitted, the axis that meets the inputs.

    Raises:
        Mismatch: the statistics do not fit the weights, or each other.
        BadInput: they hold none for these weights.
    """
    if not grams:
        return {}
    axes = {name: axis for name in inputs.names for axis in (0, 1) if f"{name}/{axis}" in grams[0]}
    if not axes:
        label = next(iter(grams[0].values())).label
        raise BadInput(f"{label}: no Gram matrix of any tensor that is merged; gather them from these experts.")
    for name, axis in axes.items():
        weight = inputs.operands(name)[0]
        for gram in grams:
            matrix = gram.get(f"{name}/{axis}")
            if matrix is None or len(weight.shape) != 2 or matrix.shape != (weight.shape[axis],) * 2:
                shape = None if matrix is None else list(matrix.shape)
                label = next(iter(gram.values())).label
                raise Mismatch(
                    f"{name}: its Gram matrix in {label} is {shape}, the weight {list(weight.shape)}; gather them from "
                    "the experts that are merged."
                )
    return axes
