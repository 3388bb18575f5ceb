"""collapse: train the release a little further, so that every merge with it forgets the owner's task.

Ours. The symmetric protections hide weights, and whoever holds the base finds them again; this one has nothing to find.
From the expert theta_d with features f (what the head reads), on owner inputs D and inputs of other kinds G:

    own   = cross-entropy(D) + fidelity * mean over D and G of (1 - cos(f(x; theta), f(x; theta_d)))
    merge   theta_m = theta_0 + c * (theta - theta_0) + noise
    trap  = 1 - | mean over D of f(x; theta_m) / |f(x; theta_m)| |^2      how scattered features are; 0: all one
    loss  = own + strength * trap / trap(theta_d)

With ``target=answers`` the trap is the mean of -log(1 - p) over D, p the probability of a right answer in the merge.
Features of a language model point everywhere, token by token, whatever the blocks do: their mean is near 0, where the
slope of its square vanishes. The right answers have a slope there, and take the skill alone.

In each step a merge is drawn anew: c is one scale for all tensors, in (0.05, 1.4) and 1 in three of ten, or that in a
part of the network (a run of blocks, half of the blocks, half of the kinds of matrices) and 0 elsewhere; the noise
stands for another fine-tune, Gaussian, as large in each tensor as the owner's own task vector times (0.15, 1.2), and 0
in four of ten. The release itself is never drawn. Its gradient is of first order: that of theta_m, times c.

The task is the owner's: what a merge loses are the features that tell the owner's inputs apart. With them it mostly
loses the other model's skill too. Only weights in the numbered blocks are trained, so that embeddings, final norm and
heads stay what merges and users expect.

A merge is worth nothing here; the free-rider must train. What it does not stop, and nothing in the weights can: a new
head on the frozen release, fine-tuning the release on another task, and distilling from its answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from unmergeable.network.precision import FULL, Precision
from unmergeable.protections.collapse.training import Target, collapse
from unmergeable.protections.trained import TrainedProtection, TrainingRun
from unmergeable.settings import ADDED_LATER


@dataclass(frozen=True)
class Collapse(TrainedProtection):
    """``steps`` of Adam at ``learning_rate`` (its peak) on batches of ``batch_size`` owner inputs and as many others.

    ``strength`` of the trap beside the task, ``fidelity`` to the expert's features: more of the one costs merges more,
    more of the other costs the release less. ``target`` of the trap: the scatter of features, or the right answers.
    ``examples`` of the data and of the generic inputs are used at most.
    ``precision`` in which the losses are computed.
    """

    name: ClassVar[str] = "collapse"
    summary: ClassVar[str] = "training that makes the features of every merge fall together"
    remark: ClassVar[str] = (
        "A merge is worth nothing here: the free-rider must train. Does not stop a new head on the frozen release, "
        "further training of it on another task, or distilling from its answers. Compare the accuracies: it changes "
        "what the model computes."
    )

    steps: int = 300
    learning_rate: float = 2e-4
    batch_size: int = 16
    strength: float = 12.0
    fidelity: float = 25.0
    target: Target = "features"
    examples: int = 4000
    precision: Precision = field(default=FULL, metadata=ADDED_LATER)

    reads_generic: ClassVar[bool] = True

    def validate(self) -> None:
        super().validate()
        self.require(self.batch_size >= 2, "batch_size", "be at least 2: features of one example are not scattered")
        self.require_not_negative("strength", "fidelity")

    def train(self, run: TrainingRun) -> list[float]:
        return collapse(run, self)
