"""Scores and gradients of a task are those of the formula, however the examples are batched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from network.small_classifier import Classifier, make_task
from unmergeable.errors import BadInput
from unmergeable.evaluation.analysis import backpropagate_task, score_task
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import Prediction, Task

COUNT = 23


def whole(classifier: Classifier) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of all examples at once."""
    (batch,) = make_task(COUNT, COUNT).batches
    assert batch.labels is not None
    return classifier(batch.inputs["features"]), batch.labels


@pytest.mark.parametrize("batch_size", [1, 5, COUNT])
def test_is_the_mean_over_all_choices(batch_size: int) -> None:
    classifier = Classifier()
    logits, labels = whole(classifier)
    scored = score_task(classifier, make_task(COUNT, batch_size))
    assert scored.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-12)
    assert scored.credit == pytest.approx(float((logits.argmax(dim=1) == labels).double().mean()), rel=1e-12)
    assert scored.loss != pytest.approx(score_task(classifier, make_task(COUNT, batch_size, seed=1)).loss)  # control


@pytest.mark.parametrize("batch_size", [5, COUNT])
def test_gradient_is_that_of_the_mean(batch_size: int) -> None:
    classifier = Classifier()
    loss = functional.cross_entropy(*whole(classifier))
    expected = torch.autograd.grad(loss, list(classifier.parameters()))
    for parameter in classifier.parameters():
        parameter.grad = torch.ones_like(parameter)  # what an earlier step left
    assert backpropagate_task(classifier, make_task(COUNT, batch_size)) == pytest.approx(loss.item(), rel=1e-12)
    for parameter, gradient in zip(classifier.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


def test_sixteen_bit_logits_are_widened() -> None:
    """In float16 the sum over examples would be infinite."""
    features = torch.full((2, 2), 40000.0, dtype=torch.float16)
    features[:, 1] *= -1
    batch = EncodedBatch({"features": features}, torch.tensor([1, 1]))
    task = Task("half", [batch], lambda network, given: Prediction(given.inputs["features"], given.labels))
    assert score_task(torch.nn.Linear(1, 1), task).loss == 80000.0


@pytest.mark.parametrize("measure", [score_task, backpropagate_task])
def test_needs_labelled_examples(measure: Callable[[Any, Task], object]) -> None:
    with pytest.raises(BadInput, match="no labels"):
        measure(Classifier(), make_task(COUNT, 5, labels=False))
    with pytest.raises(BadInput, match="no examples"):
        measure(Classifier(), make_task(0, 5))
