"""Examples drawn from memory are those of the task, however they are padded, and training on them lowers the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from network.small_classifier import Classifier, make_task
from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import added, fine_tune, gather_examples, judge, select
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task, accuracy
from unmergeable.network.train import Schedule
from zoo import TOYS, write_toy


def texts(*lengths: int, seed: int = 0, filled: int = 5) -> EncodedBatch:
    """Token ids of texts, padded on the right to the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), filled)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(6, 60, (length,), generator=generator)
        mask[row, :length] = 1
    return EncodedBatch({"input_ids": ids, "attention_mask": mask})


def test_gathers_the_first_examples_in_their_order() -> None:
    task = make_task(10, 4)
    examples = gather_examples(task, 7)
    (whole,) = make_task(10, 10).batches
    assert torch.equal(examples.inputs["features"], whole.inputs["features"][:7])
    assert examples.labels is not None
    assert whole.labels is not None
    assert torch.equal(examples.labels, whole.labels[:7])
    assert len(gather_examples(task, 4)) == 4
    chosen = select(examples, torch.tensor([3, 0]))
    assert torch.equal(chosen.inputs["features"], whole.inputs["features"][[3, 0]])
    with pytest.raises(BadInput, match="task 0: 10 examples where 11 are asked for"):
        gather_examples(task, 11)


def test_padding_to_a_common_length_changes_no_choice(tmp_path: Path) -> None:
    network = load_network(write_toy(TOYS["llama"], tmp_path / "toy"))
    first, second = texts(4, 3), texts(9, 6, seed=1)
    task = Task("texts", [first, second])
    examples = gather_examples(task, 4, pad=7)
    assert examples.inputs["input_ids"].shape == (4, 9)
    assert examples.inputs["input_ids"][0, 4:].tolist() == [7] * 5
    assert not examples.inputs["attention_mask"][0, 4:].any()
    assert torch.equal(select(examples, torch.tensor([0, 1])).inputs["input_ids"], first.inputs["input_ids"])
    found = judge(network, task.predict, examples, batch_size=4)
    apart = added(judge(network, task.predict, batch, batch_size=1) for batch in (first, second))
    assert (found.choices, found.right) == (apart.choices, apart.right) == (18, apart.right)
    assert found.accuracy == pytest.approx(accuracy(network, task))
    assert found.loss == pytest.approx(apart.loss, rel=1e-5)
    hidden = EncodedBatch({**examples.inputs, "attention_mask": torch.ones(4, 9, dtype=torch.int64)})
    assert judge(network, task.predict, hidden, batch_size=4).choices == 32  # control: unhidden, padding would count


def test_sizes_that_nothing_hides_are_refused() -> None:
    batches = [EncodedBatch({"features": torch.ones(2, width)}, torch.zeros(2).long()) for width in (3, 4)]
    with pytest.raises(BadInput, match="features: examples of different sizes, and no attention_mask"):
        gather_examples(Task("wide", batches), 4)


def test_judges_by_the_mean_cross_entropy() -> None:
    network, task = Classifier(), make_task(10, 4)
    examples = gather_examples(task, 10)
    found = judge(network, task.predict, examples, batch_size=3)
    logits = task.predict(network, examples).logits.float()
    assert examples.labels is not None
    assert found.mean_loss == pytest.approx(float(functional.cross_entropy(logits, examples.labels).detach()), rel=1e-6)
    assert found.accuracy == accuracy(network, task)


def test_the_first_loss_is_that_of_the_start_and_the_last_is_lower() -> None:
    network, task = Classifier(), make_task(12, 4)
    examples = gather_examples(task, 12)
    before = judge(network, task.predict, examples, batch_size=12).mean_loss
    seen: list[Tensor] = []

    def predict(network: Classifier, batch: EncodedBatch):  # type: ignore[no-untyped-def]
        seen.append(batch.inputs["features"])
        return task.predict(network, batch)

    losses = fine_tune(network, predict, examples, Schedule(40, learning_rate=0.05), batch_size=100)
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert judge(network, task.predict, examples, batch_size=12).mean_loss < 0.5 * before
    assert {len(batch) for batch in seen} == {12}  # a batch never holds more than there are
    assert not torch.equal(seen[0], seen[1])  # each epoch is a new order


def test_examples_without_labels_are_refused() -> None:
    task = make_task(4, 4, labels=False)
    with pytest.raises(BadInput, match="no labels"):
        fine_tune(Classifier(), task.predict, gather_examples(task, 4), Schedule(1), batch_size=4)
