"""mergeguard: spread the task over all layers by training, then take the most significant weights back to the base.

MergeGuard (arXiv 2511.11851) has two stages. Training, from the expert theta_d to theta':

    L = cross-entropy + alpha sum_l |theta^(l)|^2

is to disperse what the task needs over the layers. Masking, without training, on tau' = theta' - theta_0:

    theta_p = theta' - beta M tau'        M = 1 on the fraction k of the weights with the largest |tau'|, else 0

where the fraction k' of the layers that the network can least do without are left alone, and k is counted among the
weights of the others. With beta = 1, as published, masked weights are those of the base. The network is meant to live
with that; a merge, which scales tau' down and adds another, is meant not to.

What the paper leaves open, and what it is here:

* a *layer* is a module with weights of its own, a linear map or a norm with its bias (``granularity=block``: a whole
  transformer block). k' is rounded up to whole layers;
* what is *never touched*: in language models the paper names the input embedding, the final norm and the output head.
  Here, in every family, all that lies outside the numbered blocks: positions, poolers and task heads too;
* training moves the matrices inside the blocks. The square of a norm's gain or of a bias is no measure of how a task is
  spread, and is neither penalised nor trained;
* the *scale* of the penalty. ``penalty=sum`` adds up the squares of all weights: its gradient on a weight theta is
  2 alpha theta, whatever the sizes of layers. ``penalty=mean`` takes the mean square of each layer: a small number that
  can be compared between models, whose gradient is smaller by the size of the layer, and does nothing at the
  published alpha.

What it does not stop: see ``docs/mergeguard.md``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.architecture.streams import ASIDE
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, UsageError
from unmergeable.progress import Progress, silent
from unmergeable.quantile import DIGIT_BITS, DIGITS, KthLargest

Stages = Literal["both", "training", "masking"]
Granularity = Literal["module", "block"]
Penalty = Literal["sum", "mean"]

Layers = Mapping[str, tuple[str, ...]]
"""Names of tensors on disk, by the name of the layer they make up; in the order of the file."""

Each = Callable[[Callable[[str], Tensor], Sequence[str]], Iterable[Tensor]]
"""``map``, or one that uses several threads."""

CHUNK = 1 << 20
"""Elements worked on at once: temporaries of a large tensor stay small."""

_BLOCK = re.compile(r"(?:.+?\.)?\d+(?=\.)")
"""A tensor's name up to its first number: the repeated block it lies in."""

_BUFFER = re.compile("|".join(f"(?:{pattern})" for pattern in ASIDE))


@dataclass(frozen=True)
class MergeGuard:
    """``stages`` to go through. ``granularity``: what counts as a layer.

    Training: ``alpha`` of the ``penalty``, ``steps`` of AdamW at ``learning_rate`` on batches of ``batch_size``;
    ``low_rank`` r trains a low-rank update of each linear map instead of the weights (0: the weights). Masking:
    ``excluded_layers`` k', ``significant_share`` k, ``beta``; ``examples`` of the data rank the layers, at most, and a
    layer leaves the ranking at ``confidence``.
    """

    name: ClassVar[str] = "mergeguard"
    summary: ClassVar[str] = "training with a penalty on weights, then the most significant weights back to the base"
    exact: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("data", "training")

    stages: Stages = "both"
    alpha: float = 0.01
    penalty: Penalty = "sum"
    steps: int = 500
    learning_rate: float = 1e-5
    batch_size: int = 16
    low_rank: int = 0
    granularity: Granularity = "module"
    excluded_layers: float = 0.1
    significant_share: float = 0.1
    beta: float = 1.0
    examples: int = 1000
    confidence: float = 0.999

    @property
    def trains(self) -> bool:
        return self.stages != "masking"

    @property
    def masks(self) -> bool:
        return self.stages != "training"

    @property
    def reads_data(self) -> bool:
        """Whether it can do without data: only masking can, if no layer is to be excluded."""
        return self.trains or self.excluded_layers > 0

    def validate(self) -> None:
        """Raises UsageError for a setting out of range."""
        self._require(0 < self.significant_share <= 1, "significant_share", "lie above 0, and be at most 1")
        self._require(0 <= self.excluded_layers < 1, "excluded_layers", "be at least 0, and lie below 1")
        self._require(0 < self.beta <= 2, "beta", "lie above 0, and be at most 2")
        self._require(0 <= self.alpha < math.inf, "alpha", "be finite, and not negative")
        self._require(0 < self.learning_rate < 1, "learning_rate", "lie between 0 and 1")
        self._require(0 < self.confidence <= 1, "confidence", "lie above 0, and be at most 1")
        for name in ("steps", "batch_size", "examples"):
            self._require(getattr(self, name) >= 1, name, "be at least 1")
        self._require(self.low_rank >= 0, "low_rank", "be a rank, or 0 to train the weights themselves")

    def _require(self, is_valid: bool, name: str, what: str) -> None:
        if not is_valid:
            raise UsageError(f"{self.name}: {name} must {what}, not {getattr(self, name)}.")

    def layers(self, architecture: Architecture, names: Iterable[str]) -> Layers:
        """The layers that ``names`` make up; tensors outside the blocks, and buffers, are left out.

        Raises:
            BadInput: none of the tensors lies in a numbered block.
        """
        body = architecture.symmetry.select("query_key", "value_output", "heads", "feed_forward", "experts")
        blocks = {block_of(name) for name in architecture.symmetry.tensors_of(body)} - {None}
        found: dict[str, list[str]] = {}
        for name in names:
            block = block_of(name)
            if block is not None and block in blocks and _BUFFER.fullmatch(name) is None:
                layer = block if self.granularity == "block" else name.rpartition(".")[0]
                found.setdefault(layer, []).append(name)
        if not found:
            raise BadInput(f"{self.name}: no tensor of this {architecture.family} model lies in a numbered block.")
        return {layer: tuple(tensors) for layer, tensors in found.items()}

    def excluded_count(self, layers: Layers) -> int:
        """How many layers are left alone, rounded up. Raises UsageError when none would be masked."""
        count = math.ceil(self.excluded_layers * len(layers))
        if count == len(layers):
            raise UsageError(
                f"{self.name}: excluded_layers={self.excluded_layers} leaves none of {len(layers)} layers to mask; "
                "lower it."
            )
        return count

    def rank(self, weights: int) -> int:
        """How many of so many weights are masked, rounded up."""
        return math.ceil(self.significant_share * weights)

    def threshold(
        self,
        expert: TensorSource,
        base: TensorSource,
        names: Sequence[str],
        *,
        each: Each = map,
        progress: Progress = silent,
    ) -> float:
        """The magnitude |tau'| of the last weight that is masked, exactly, over all tensors of these names.

        They are read one by one, twice (four times where one is float64), and no order of them is ever made
        (:mod:`unmergeable.quantile`).
        """
        weights = sum(expert.spec(name).numel for name in names)
        is_double = any(source.spec(name).dtype == "F64" for source in (expert, base) for name in names)
        search = KthLargest(self.rank(weights), torch.float64 if is_double else torch.float32)
        passes, done = search.bits // DIGIT_BITS, 0
        while not search.is_settled:
            total = torch.zeros(DIGITS, dtype=torch.int64)
            for counts in each(partial(_digits, search, expert, base), names):
                total += counts
                done += 1
                progress("ranking weights", done, passes * len(names), "tensors")
            search = search.narrow(total)
        return search.value

    def mask(self, expert: Tensor, base: Tensor, threshold: float) -> Tensor:
        """One tensor of theta_p, from theta' and theta_0 of the same shape; rounded once, to the dtype of ``expert``.

        ``threshold`` is the magnitude of the last task vector that is masked; its equals are masked too.
        """
        vector = task_vector(expert, base)
        moved = (expert.double() - self.beta * (expert.double() - base.double())).to(expert.dtype)
        return torch.where(vector.abs() >= threshold, moved, expert)


def block_of(name: str) -> str | None:
    """The numbered block a tensor lies in (``model.layers.3``), None outside of all."""
    found = _BLOCK.match(name)
    return found.group() if found else None


def task_vector(expert: Tensor, base: Tensor) -> Tensor:
    """tau' in the dtype magnitudes are compared in: float64 if either is, else float32."""
    wide = torch.float64 if torch.float64 in (expert.dtype, base.dtype) else torch.float32
    return expert.to(wide) - base.to(wide)


def _digits(search: KthLargest, expert: TensorSource, base: TensorSource, name: str) -> Tensor:
    """How often each next digit occurs in one tensor of the task vector, int64 [DIGITS]."""
    counts = torch.zeros(DIGITS, dtype=torch.int64)
    pieces = zip(expert.tensor(name).reshape(-1).split(CHUNK), base.tensor(name).reshape(-1).split(CHUNK), strict=True)
    for piece, origin in pieces:
        counts += search.count(task_vector(piece, origin))
    return counts
