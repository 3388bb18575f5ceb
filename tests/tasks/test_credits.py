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


@pytest.mark.parametrize(("side", "computed"), [("right", 12 * 2 + 12 * 3 + 6 * 40), ("left", 30 * 40)])
def test_short_texts_are_not_computed_at_the_length_of_the_longest(side: str, computed: int) -> None:
    """Credits stay in the order of the examples; where padding is on the left, positions would move."""
    lengths = torch.tensor([2, 3, 40, 2, 3] * 6)
    places = torch.arange(40).expand(30, 40)
    mask = places < lengths[:, None] if side == "right" else places >= 40 - lengths[:, None]
    ids = torch.where(mask, torch.arange(30)[:, None] % 3, 7)
    seen: list[tuple[int, ...]] = []

    def predict(network: Any, batch: EncodedBatch) -> Prediction:
        tokens, shown = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        seen.append(tuple(tokens.shape))
        return Prediction(says(torch.where(shown, tokens, 0).amax(dim=1)), batch.labels)

    labels = torch.tensor([0, 1, 2, 0, 0, 0] * 5)
    task = Task("x", [EncodedBatch({"input_ids": ids, "attention_mask": mask.long()}, labels)], predict)
    expected = (torch.arange(30) % 3 == labels).double().numpy()
    np.testing.assert_array_equal(example_credits(nn.Linear(1, 1), task), expected)
    assert 0 < expected.mean() < 1
    assert sum(rows * width for rows, width in seen) == computed
