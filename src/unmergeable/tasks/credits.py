"""Credit example by example: what a score is the mean of, and what a bootstrap draws from."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import Predict, Task, device_of


@torch.no_grad()
def example_credits(network: Any, task: Task) -> npt.NDArray[np.float64]:
    """For each example the fraction of its choices that are right, float64 [examples] in the order of the batches.

    A classifier chooses once per example, and the credit is 0 or 1. A language model chooses each token of a text.

    Raises:
        BadInput: the data have no labels.
    """
    device = device_of(network)
    return np.concatenate([_credits(network, batch.to(device), task.predict) for batch in task.batches])


def _credits(network: Any, batch: EncodedBatch, predict: Predict) -> npt.NDArray[np.float64]:
    prediction = predict(network, batch)
    is_right = prediction.logits.argmax(dim=-1) == prediction.require_targets()
    if len(is_right) == len(batch):
        return is_right.double().cpu().numpy()
    if len(batch) == 1:
        return np.array([float(is_right.double().mean())])
    return np.concatenate([_credits(network, single, predict) for single in batch.singles()])
