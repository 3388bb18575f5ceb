"""trap2: fine-tuning that keeps the loss low at scale 1 of the update, and raises it at every other scale.

TRAP^2 (arXiv 2601.21898, ICML 2026, "Making Models Unmergeable via Scaling-Sensitive Loss Landscape"). With the loss L
on the owner's task, the base theta_0 and the update tau = theta - theta_0:

    J = L(theta) - weight * E_s[ w(s) * L(theta_0 + s * tau) ]
    s uniform in [smallest_scale, largest_scale] without (1 - gap, 1 + gap),  w(s) = 1/s

A merge scales updates down or up, so that a release whose loss is high at all scales but 1 is to be useless in it. One
scale is drawn in each step, and both losses are of the same batch. Published: weight 0.001 for LoRA, 0.005 to 0.01 for
full weights (0.005 in the authors' command, 0.01 in their default), scales 0.05 to 2 with a gap of 0.05, AdamW at 1e-5
without weight decay on batches of 32, gradients clipped to a norm of 1.

Ours: it starts from the expert, where the paper starts from the base (an owner has an expert); ``steps``, where the
paper stops when validation no longer improves; weights outside the numbered blocks are not trained.

What it does not stop: scales other than one say nothing of what is added. A merge that keeps the release at 1 and adds
another model's update is outside of what is trained, and an attacker who holds the base chooses the coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.network.fine_tune import select
from unmergeable.network.precision import FULL, Precision
from unmergeable.network.tasks import device_of
from unmergeable.network.train import Batch, Schedule, shuffled_batches, train
from unmergeable.protections.merged_loss import as_loss, gradient_at_merge
from unmergeable.protections.trained import TrainedProtection, TrainingRun
from unmergeable.randomness import Stream
from unmergeable.settings import ADDED_LATER

Weighting = Literal["inverse", "inverse_root", "none"]

_POWERS = {"inverse": -1.0, "inverse_root": -0.5, "none": 0.0}


@dataclass(frozen=True)
class Trap2(TrainedProtection):
    """``steps`` of AdamW at ``learning_rate`` (its peak) on batches of ``batch_size``.

    ``weight`` of the raised loss, ``weighting`` of scales; ``smallest_scale``, ``largest_scale`` and ``gap`` say which
    scales are drawn. ``examples`` of the data are used at most.
    ``precision`` in which the losses are computed.
    """

    name: ClassVar[str] = "trap2"
    summary: ClassVar[str] = "training that raises the loss at every scale of the update but 1"
    remark: ClassVar[str] = (
        "Meant against merges that scale the release; says nothing of merges that keep it whole and add to it. Compare "
        "the accuracies: it changes what the model computes."
    )

    steps: int = 1000
    learning_rate: float = 1e-5
    batch_size: int = 32
    weight: float = 0.01
    weighting: Weighting = "inverse"
    smallest_scale: float = 0.05
    largest_scale: float = 2.0
    gap: float = 0.05
    examples: int = 4000
    precision: Precision = field(default=FULL, metadata=ADDED_LATER)

    def validate(self) -> None:
        super().validate()
        self.require_not_negative("weight")
        self.require(0 < self.gap < 1, "gap", "lie between 0 and 1")
        self.require(0 < self.smallest_scale < 1 - self.gap, "smallest_scale", "lie between 0 and 1 - gap")
        self.require(1 + self.gap < self.largest_scale <= 10, "largest_scale", "lie between 1 + gap and 10")

    def train(self, run: TrainingRun) -> list[float]:
        device = device_of(run.network)
        parameters = run.parameters
        stream = Stream.from_seed(run.seed).child("trap2")

        def batches() -> Iterator[Batch]:
            order = shuffled_batches(len(run.examples), min(self.batch_size, len(run.examples)), run.seed)
            for step in range(self.steps):
                yield torch.tensor(step), next(order)

        def loss(network: nn.Module, batch: Batch) -> Tensor:
            step, numbers = (tensor.cpu() for tensor in batch)
            examples = select(run.examples, numbers).to(device)

            def entropy() -> Tensor:
                prediction = run.predict(network, examples)
                return functional.cross_entropy(prediction.logits.float(), prediction.require_targets())

            own = entropy()
            if self.weight == 0:
                return own
            scale = self.scale(float(stream.child(f"step {int(step)}").uniform(1)[0]))
            value, gradients = gradient_at_merge(entropy, parameters, run.base, dict.fromkeys(run.base, scale))
            factor: float = self.weight * scale ** _POWERS[self.weighting]
            return own - factor * as_loss(value, gradients, parameters)

        return train(
            run.network,
            batches(),
            loss,
            Schedule(self.steps, self.learning_rate),
            is_trained=run.is_trained,
            seed=run.seed,
            kept=run.kept,
            precision=self.precision,
            stage="raising the loss at other scales",
            progress=run.progress,
        )

    def scale(self, drawn: float) -> float:
        """A scale outside the gap, from a number that is uniform in [0, 1)."""
        below, above = 1 - self.gap - self.smallest_scale, self.largest_scale - 1 - self.gap
        at = drawn * (below + above)
        return self.smallest_scale + at if at < below else 1 + self.gap + at - below
