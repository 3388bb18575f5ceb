"""``regmean``: the linear maps that best repeat what each expert's do on its own inputs (RegMean, arXiv 2212.09849).

For a linear layer y = W x with G_i = X_i^T X_i / rows of the inputs X_i of expert i on its own data:

    W = argmin sum_i c_i |X_i W^T - X_i W_i^T|^2 / rows_i,    W^T = (sum_i c_i G_i)^-1 sum_i c_i G_i W_i^T

The off-diagonal entries of G_i are first multiplied by ``alpha``, as the paper proposes: layers are fitted one by one,
and inputs change when the layers before them do. Every other tensor is averaged, sum_i c_i theta_i / sum_i c_i.

Inputs that are always 0 leave their weights undetermined; a ridge of ``RIDGE`` times the mean of the diagonal, towards
that average, decides them, and makes the matrix invertible for any alpha. It is solved in float64.

``statistics`` is a folder with a subfolder of G_i for each expert, ``1``, ``2``, …. ``NAME/1`` belongs to the axis 1 of
the tensor NAME, which is where ``nn.Linear`` has its inputs. Without it every G_i is the identity: a weighted average.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.merges.base import Inputs, TensorMerge, TermsOf, positive_coefficients
from unmergeable.merges.blocks import Operand, Scratch, merge_whole, weighted_sum
from unmergeable.merges.fisher import open_statistics, require_examples
from unmergeable.merges.linear import merge_tensor as average_tensor
from unmergeable.merges.models import Model

RIDGE = 1e-6
"""Small against an input that occurs, large against the rounding (1e-7) of the float32 in which G_i are summed."""


@dataclass(frozen=True)
class RegMean:
    """``examples`` is the most that are read of each data set where data are given instead of statistics."""

    name: ClassVar[str] = "regmean"
    needs_base: ClassVar[bool] = False
    fewest_experts: ClassVar[int] = 2
    most_experts: ClassVar[int | None] = None
    varies: ClassVar[Mapping[str, Literal["expert", "tensor"]]] = {}

    statistics: str = ""
    alpha: float = 0.9
    examples: int = 256
    seed: int = 0

    def validate(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha={self.alpha}: must lie in [0, 1], what is kept of the off-diagonal entries.")
        require_examples(self.examples)

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        """The c_i, 1 by default. Raises UsageError for a negative one, or if all are 0."""
        return positive_coefficients(self.name, coefficients)

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        experts = len(inputs.operands(inputs.names[0]))
        grams = open_statistics(self.statistics, experts) if self.statistics else []
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
            found = gram.get(f"{name}/{axis}")
            if found is None or len(weight.shape) != 2 or found.shape != (weight.shape[axis],) * 2:
                shape = None if found is None else list(found.shape)
                label = next(iter(gram.values())).label
                raise Mismatch(
                    f"{name}: its Gram matrix in {label} is {shape}, the weight {list(weight.shape)}; gather them from "
                    "the experts that are merged."
                )
    return axes
