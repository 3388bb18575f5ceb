"""Credit by example, for networks that choose once and for those that choose every token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import Prediction, Task
from unmergeable.tasks import example_credits

ANSWERS = torch.tensor([[0, 1, 2], [2, 2, 2], [1, 0, 1], [0, 0, 0]])
"""What the network chooses at each place; it is right where that is what the labels say."""


def says(answers: Tensor) -> Tensor:
    return torch.eye(3)[answers]


def batches(labels: Tensor | None) -> list[EncodedBatch]:
    sizes = [3, 1]  # the last one is not full
    parts = zip(ANSWERS.split(sizes), [None, None] if labels is None else labels.split(sizes), strict=True)
    return [EncodedBatch({"answers": answers}, some) for answers, some in parts]


def first_answer(network: Any, batch: EncodedBatch) -> Prediction:
    return Prediction(says(batch.inputs["answers"][:, 0]), batch.labels)


def test_one_choice_each() -> None:
    task = Task(
        "x",
        batches(torch.tensor([0, 1, 1, 0])),
        lambda network, b: Prediction(says(b.inputs["answers"][:, 0]), b.labels),
    )
    np.testing.assert_array_equal(example_credits(nn.Linear(1, 1), task), [1, 0, 1, 1])


def test_many_choices_each() -> None:
    """The mean over an example is its own, however many there are in a batch."""

    def predict(network: Any, batch: EncodedBatch) -> Prediction:
        assert batch.labels is not None
        length = int(batch.labels.min())  # batches are cut to one length, and here the shortest decides
        return Prediction(
            says(batch.inputs["answers"][:, :length].flatten()), torch.zeros(len(batch) * length, dtype=torch.long)
        )

    task = Task("x", batches(torch.tensor([3, 3, 2, 3])), predict)
    np.testing.assert_allclose(example_credits(nn.Linear(1, 1), task), [1 / 3, 0, 1 / 2, 1])


def test_labels_are_needed() -> None:
    task = Task("x", batches(None), first_answer)
    with pytest.raises(BadInput, match="no labels"):
        example_credits(nn.Linear(1, 1), task)
