"""How a network's output is read: choices of classifiers and of language models, accuracy and entropy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from network.small_classifier import CLASSES, Classifier, make_task
from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task, accuracy, entropy, is_causal_language_model, predict
from zoo import TOYS, write_toy


def test_entropy_of_sure_and_of_even_answers() -> None:
    even, sure = torch.zeros(3, CLASSES), torch.tensor([[0.0, 1e4, 0.0, 0.0]])
    assert float(entropy(even)) == pytest.approx(math.log(CLASSES), rel=1e-6)
    assert float(entropy(sure)) == 0.0
    # Choices are averaged, not added up; shifts of the logits do not matter.
    assert float(entropy(torch.cat([even[:1], sure]) + 7)) == pytest.approx(math.log(CLASSES) / 2, rel=1e-6)


def test_accuracy_counts_examples_whatever_the_batches() -> None:
    network = Classifier()
    (batch,) = make_task(10, 10).batches
    answers = network(batch.inputs["features"]).argmax(-1)
    labels = torch.where(torch.arange(10) < 7, answers, (answers + 1) % CLASSES)
    whole = EncodedBatch(batch.inputs, labels)
    parts = [
        EncodedBatch({"features": batch.inputs["features"][s]}, labels[s])
        for s in (slice(0, 3), slice(3, 4), slice(4, 10))
    ]
    predict_features = make_task(1, 1).predict
    assert accuracy(network, Task("whole", [whole], predict_features)) == 0.7
    assert accuracy(network, Task("parts", parts, predict_features)) == 0.7
    assert accuracy(network, Task("singles", list(whole.singles()), predict_features)) == 0.7
    with pytest.raises(BadInput, match="the data have no labels"):
        accuracy(network, make_task(3, 2, labels=False))
    with pytest.raises(BadInput, match="task 0: no examples to score"):
        accuracy(network, make_task(0, 2))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_language_model_predicts_every_token_but_the_first(name: str, tmp_path: Path) -> None:
    network = load_network(write_toy(TOYS[name], tmp_path))
    assert is_causal_language_model(network)
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    with torch.no_grad():
        found = predict(network, EncodedBatch({"input_ids": ids, "attention_mask": mask}))
        logits = network(input_ids=ids, attention_mask=mask).logits
    assert found.require_targets().tolist() == [*ids[0, 1:].tolist(), *ids[1, 1:3].tolist()]
    assert torch.equal(found.logits, torch.cat([logits[0, :5], logits[1, :2]]))


def test_a_classifier_chooses_once(tmp_path: Path) -> None:
    network = load_network(write_toy(TOYS["vit"], tmp_path))
    assert not is_causal_language_model(network)
    labels = torch.tensor([0, 1])
    batch = EncodedBatch(TOYS["vit"].inputs(torch.Generator().manual_seed(0)), labels)
    found = predict(network, batch)
    assert found.logits.shape[0] == 2
    assert found.require_targets() is labels


def test_an_encoder_and_a_decoder_choose_what_the_decoder_reads(tmp_path: Path) -> None:
    network = load_network(write_toy(TOYS["t5"], tmp_path))
    inputs = TOYS["t5"].inputs(torch.Generator().manual_seed(0))
    ids = inputs["decoder_input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0

    found = predict(network, EncodedBatch({**inputs, "decoder_attention_mask": mask}))

    assert found.require_targets().tolist() == [*ids[0, 1:].tolist(), *ids[1, 1:4].tolist()]
    with torch.no_grad():
        logits = network(**inputs).logits  # a decoder looks back only: later masks change nothing
    assert torch.allclose(found.logits, torch.cat([logits[0, :-1], logits[1, :3]]), rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="give both, as input_ids and decoder_input_ids"):
        predict(network, EncodedBatch({"input_ids": inputs["input_ids"]}))


@pytest.mark.parametrize("name", ["bert-embedding", "bert"])
def test_other_networks_need_a_head(name: str, tmp_path: Path) -> None:
    network = load_network(write_toy(TOYS[name], tmp_path))
    batch = EncodedBatch(TOYS[name].inputs(torch.Generator().manual_seed(0)))
    with pytest.raises(BadInput, match="no classifier and no language model; give a checkpoint that is one"):
        predict(network, batch)


@pytest.mark.parametrize(
    ("name", "inputs", "reason"),
    [
        ("vit", {"pixels": torch.zeros(1, 3, 32, 32)}, r"pixels \[1, 3, 32, 32\] \("),
        ("vit", {"pixel_values": torch.zeros(1, 3, 9, 9)}, r"pixel_values \[1, 3, 9, 9\] \(.*size"),
        ("vit", {"pixel_values": torch.zeros(2, 5)}, r"pixel_values \[2, 5\] \("),
        ("gpt2", {"input_ids": torch.tensor([[1, 100]])}, r"input_ids \[1, 2\] \(.*range"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    name: str, inputs: dict[str, torch.Tensor], reason: str, tmp_path: Path
) -> None:
    network = load_network(write_toy(TOYS[name], tmp_path))
    with pytest.raises(BadInput, match=f"does not take the inputs {reason}") as caught:
        predict(network, EncodedBatch(inputs))
    assert "\n" not in str(caught.value)
