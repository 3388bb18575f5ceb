"""A classifier small enough to be worked out by hand, and data for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import Prediction, Task

FEATURES, CLASSES = 6, 4


class Classifier(nn.Module):
    """Two linear layers with a tanh between them, in float64 where exactness is asked for."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, 5, dtype=dtype)
        self.outer = nn.Linear(5, CLASSES, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(features)))


def predict(network: Any, batch: EncodedBatch) -> Prediction:
    return Prediction(network(batch.inputs["features"]), batch.labels)


def make_task(
    count: int, batch_size: int, *, seed: int = 0, labels: bool = True, dtype: torch.dtype = torch.float64
) -> Task:
    """Random features and random labels."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    classes = torch.randint(CLASSES, (count,), generator=generator)
    batches = [
        EncodedBatch(
            {"features": features[start : start + batch_size]}, classes[start : start + batch_size] if labels else None
        )
        for start in range(0, count, batch_size)
    ]
    return Task(f"task {seed}", batches, predict)
