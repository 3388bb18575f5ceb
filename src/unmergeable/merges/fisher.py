"""``fisher``: average each weight by how much it matters to each expert (Fisher merging, arXiv 2111.09832).

With F_i the diagonal Fisher information of expert i on its own data and lambda_i its coefficient, per weight:

    theta = sum_i w_i theta_i / sum_i w_i,    w_i = lambda_i F_i / |F_i|

|F_i| is the norm of all of F_i (``normalize``), so that an expert that is less sure of its data has as much of a say.
Where all F_i are nearly 0 nobody has an opinion. As in the authors' code F_1 is then at least ``floor`` (before it is
normalised), and the first expert, theirs is the target model, decides; ``favor_first=false`` lifts all F_i instead,
which averages.

``statistics`` is a folder with a subfolder of F_i for each expert, ``1``, ``2``, …, under the names and in the shapes
of the weights. Without it every F_i is 1 and the merge a weighted average, which the authors call isotropic.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.merges.base import Inputs, TensorMerge, TermsOf, positive_coefficients
from unmergeable.merges.blocks import BLOCK_ELEMENTS, Operand, Scratch, merge_blocks, weighted_sum
from unmergeable.merges.linear import merge_tensor as average_tensor
from unmergeable.merges.models import Model, source_model


@dataclass(frozen=True)
class Fisher:
    """``labels``, ``examples`` and ``seed`` say how F_i is estimated where data are given instead of statistics.

    ``labels`` are ``sampled`` from the network's own predictions, ``expected`` over all of them, or the data's own,
    ``empirical``. ``examples`` is the most that are read of each data set.
    """

    name: ClassVar[str] = "fisher"
    needs_base: ClassVar[bool] = False
    fewest_experts: ClassVar[int] = 2
    most_experts: ClassVar[int | None] = None
    varies: ClassVar[Mapping[str, Literal["expert", "tensor"]]] = {}

    statistics: str = ""
    normalize: bool = True
    favor_first: bool = True
    floor: float = 1e-6
    labels: Literal["sampled", "expected", "empirical"] = "sampled"
    examples: int = 256
    seed: int = 0

    def validate(self) -> None:
        if not self.floor > 0:
            raise UsageError(f"floor={self.floor}: must be positive, or weights without information have no average.")
        require_examples(self.examples)

    def resolve(self, coefficients: Sequence[float | None]) -> tuple[float, ...]:
        """The lambda_i, 1 by default. Raises UsageError for a negative one, or if all are 0."""
        return positive_coefficients(self.name, coefficients)

    def prepare(self, inputs: Inputs, terms: TermsOf) -> TensorMerge:
        if not self.statistics:
            return partial(_isotropic, terms=terms)
        experts = len(inputs.operands(inputs.names[0]))
        fishers = open_statistics(self.statistics, experts)
        for name in inputs.names:
            _require_alike(name, inputs.operands(name)[0], fishers)
        norms = [_norm(fisher, inputs.names) for fisher in fishers] if self.normalize else [1.0] * experts

        def merge(name: str, operands: Sequence[Operand], scratch: Scratch) -> Tensor:
            scales = [value / norm for value, norm in zip(terms(name).coefficients, norms, strict=True)]
            floors = [self.floor] + [0.0 if self.favor_first else self.floor] * (experts - 1)
            its = [fisher[name] for fisher in fishers]
            return merge_tensor(name, operands, its, scratch, scales=scales, floors=floors)

        return merge


def require_examples(examples: int) -> None:
    """Raise UsageError unless at least one example may be read."""
    if examples < 1:
        raise UsageError(f"examples={examples}: at least one is needed.")


def open_statistics(folder: str, experts: int) -> list[Model]:
    """The statistics of each expert, from the subfolders ``1``, ``2``, ….

    Raises:
        CheckpointError: one of them is missing or cannot be read.
        Mismatch: there are more of them than experts.
    """
    if (Path(folder) / str(experts + 1)).exists():
        raise Mismatch(f"{folder}: statistics of more than {experts} experts; they belong to another merge.")
    return [
        source_model(f"statistics {number}", open_checkpoint(Path(folder) / str(number)))
        for number in range(1, experts + 1)
    ]


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
