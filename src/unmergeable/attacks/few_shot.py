"""``few_shot``: train what was protected, or a merge that contains it, on a handful of labelled examples.

    min over theta of the mean cross-entropy on n examples, from theta = the weights as they are

An attacker who has no task data left cannot train; one who has a little can, and a merge that looks broken may be a few
steps away from working. n = 16, 100 and 1000 are the usual sizes. ``low_rank=0`` trains all weights, r > 0 an update of
rank r beside every linear layer (LoRA, arXiv 2106.09685).

The attacker has n labelled examples in all, so they choose the learning rate too: by cross-validation in ``FOLDS``
folds, of which as many take a turn as ``JUDGED`` examples need (all with n = 16, one with n = 1000). Not training
at all is one of the choices. Of the rates whose accuracy on the examples left out is within a standard error of the
best, that with the lowest loss there wins: a few more right may be luck. Then all n are trained on with it.

What this is worth is the lead over the same examples, steps and rates from a start without the victim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from unmergeable.errors import UsageError

FOLDS = 4
JUDGED = 50
"""Enough to tell rates that are ten times apart; with more, the sweep would cost more than the training."""


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
    """

    name: ClassVar[str] = "few_shot"
    summary: ClassVar[str] = "train on n labelled examples, and see how far the same gets without the victim"
    exact: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("base", "data")

    samples: int = 100
    learning_rates: str = "3e-5,1e-4,3e-4,1e-3"
    steps: int = 100
    batch_size: int = 16
    low_rank: int = 0
    seed: int = 0

    def validate(self) -> None:
        require_training(self.samples, self.steps, self.batch_size)
        parse_rates(self.learning_rates)
        if self.low_rank < 0:
            raise UsageError(f"low_rank={self.low_rank}: give 0 to train all weights, or a rank.")


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
