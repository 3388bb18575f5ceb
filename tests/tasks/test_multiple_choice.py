"""Choices by likelihood: the numbers of the obvious computation, and records that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polynomials.written import original
from tasks.parts import require_parts
from tasks.speakers import ids_of, load_speaker, task_data, write_records, write_speaker
from unmergeable.errors import BadInput, UnmergeableError
from unmergeable.network.polynomial_network import load_polynomial_network
from unmergeable.polynomials.rewriting import Polynomials
from unmergeable.settings import configure
from unmergeable.tasks import MultipleChoice
from unmergeable.tasks.likelihood import continuation_log_probabilities
from unmergeable.tasks.multiple_choice import ChoiceLikelihoods

RECORDS: list[dict[str, Any]] = [
    {"prompt": "what is a cat?", "choices": ["a pet", "it", "blue, or so they say"], "answer": 1},
    {"prompt": "one", "choices": ["two", "three"], "answer": "three"},
    {"prompt": "a somewhat longer question, about dogs:", "choices": ["x", "y", "z", "no"], "answer": "D"},
    {"prompt": "b", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answer": "0"},
]
RIGHT = [1, 1, 3, 0]
CHOICES = [["a pet", "it", "blue, or so they say"], ["two", "three"], ["x", "y", "z", "no"], ["yes", "no"]]

TOLERANCE = 64 * float(np.finfo(np.float32).eps)
"""Times the sum of the absolute terms: what reordering the sums of a two-layer network may change."""


@torch.no_grad()
def one_by_one(network: Any, prompt: str, choice: str) -> float:
    """One text at a time, without padding, without a cache."""
    if network.config.is_encoder_decoder:
        labels = ids_of(choice)
        start = network.config.decoder_start_token_id
        logits = network(
            input_ids=torch.tensor([ids_of(prompt)]), decoder_input_ids=torch.tensor([[start, *labels[:-1]]])
        ).logits[0]
    else:
        labels = ids_of(f" {choice}")
        begin = len(ids_of(prompt))
        logits = network(input_ids=torch.tensor([ids_of(prompt) + labels])).logits[0, begin - 1 : -1]
    return float(logits.double().log_softmax(-1)[range(len(labels)), labels].sum())


@pytest.mark.parametrize("toy", ["llama", "gpt2", "bloom", "opt", "mistral", "gemma2", "falcon-rw-like", "t5"])
def test_the_numbers_are_those_of_one_text_at_a_time(toy: str, tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", toy)
    network = load_speaker(folder)
    data = task_data(folder, write_records(tmp_path / "x.jsonl", RECORDS))
    scorer = MultipleChoice().scorer(data, network)
    assert isinstance(scorer, ChoiceLikelihoods)
    expected = [
        np.array([one_by_one(network, record["prompt"], choice) for choice in choices])
        for record, choices in zip(RECORDS, CHOICES, strict=True)
    ]
    for batch_size in (1, 5, 64):
        found = continuation_log_probabilities(network, scorer.questions, batch_size=batch_size)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=0)
    right = [int(scores.argmax() == answer) for scores, answer in zip(expected, RIGHT, strict=True)]
    np.testing.assert_array_equal(scorer.credits(network), right)
    losses = [-(scores - np.logaddexp.reduce(scores))[answer] for scores, answer in zip(expected, RIGHT, strict=True)]
    np.testing.assert_allclose(scorer.losses(network), losses, rtol=0, atol=TOLERANCE * 200)
    require_parts(scorer, network, tolerance=TOLERANCE * 200)


def test_an_encoder_and_decoder_of_polynomials_is_one_too(tmp_path: Path) -> None:
    """Its class is not among those of transformers, but extends one."""
    folder = write_speaker(tmp_path / "speaker", "flan-t5")
    polynomials = Polynomials("hermite", order=8)
    network = load_polynomial_network(original("flan-t5", tmp_path / "t5").write(tmp_path / "written", polynomials))
    data = task_data(folder, write_records(tmp_path / "x.jsonl", RECORDS))
    scorer = MultipleChoice().scorer(data, network)
    assert isinstance(scorer, ChoiceLikelihoods)
    found = continuation_log_probabilities(network, scorer.questions, batch_size=64)
    for record, choices, scores in zip(RECORDS, CHOICES, found, strict=True):
        expected = np.array([one_by_one(network, record["prompt"], choice) for choice in choices])
        np.testing.assert_allclose(scores, expected, rtol=TOLERANCE)


def test_a_choice_that_is_taken_is_right(tmp_path: Path) -> None:
    """Control: with the model's own choices for answers every credit is 1, with any other 0."""
    folder = write_speaker(tmp_path / "speaker", "llama")
    network = load_speaker(folder)
    for shift in (0, 1):
        rows = []
        for record, choices in zip(RECORDS, CHOICES, strict=True):
            scores = [one_by_one(network, record["prompt"], choice) for choice in choices]
            rows.append({**record, "answer": (int(np.argmax(scores)) + shift) % len(choices)})
        data = task_data(folder, write_records(tmp_path / f"{shift}.jsonl", rows))
        assert MultipleChoice().scorer(data, network).credits(network).mean() == 1 - shift


@pytest.mark.parametrize(("normalise", "extra"), [("tokens", 1), ("characters", 0)])
def test_scores_by_length(normalise: str, extra: int, tmp_path: Path) -> None:
    """A token is a character here, and the blank between prompt and choice is one."""
    folder = write_speaker(tmp_path / "speaker", "llama")
    network = load_speaker(folder)
    data = task_data(folder, write_records(tmp_path / "x.jsonl", RECORDS))
    losses = configure(MultipleChoice, {"normalise": normalise}).scorer(data, network).losses(network)
    for loss, record, choices, right in zip(losses, RECORDS, CHOICES, RIGHT, strict=True):
        totals = np.array([one_by_one(network, record["prompt"], choice) for choice in choices])
        scores = totals / [len(choice) + extra for choice in choices]
        assert loss == pytest.approx(np.logaddexp.reduce(scores) - scores[right], abs=TOLERANCE * 200)


def test_classes_are_chosen_by_words(tmp_path: Path) -> None:
    """The same as records that list the words; and single tokens need one pass, which agrees with two."""
    folder = write_speaker(tmp_path / "speaker", "gpt2")
    network = load_speaker(folder)
    questions = ["who?", "where is it?", "how many"]
    labelled = [{"text": text, "label": number} for number, text in enumerate(questions)]
    listed = [{"prompt": f"q: {text} a:", "choices": ["a", "b", "c"], "answer": n} for n, text in enumerate(questions)]
    words = {"prompt": "text", "answer": "label", "words": ["a", "b", "c"], "template": "q: {prompt} a:"}
    for separator in ("", " "):
        one = configure(MultipleChoice, {**words, "separator": separator})
        other = MultipleChoice(separator=separator)
        losses = [
            kind.scorer(task_data(folder, write_records(tmp_path / "x.jsonl", rows)), network).losses(network)
            for kind, rows in ((one, labelled), (other, listed))
        ]
        np.testing.assert_array_equal(*losses)


def test_a_chat_template_is_used(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "llama", chat=True)
    network = load_speaker(folder)
    data = task_data(folder, write_records(tmp_path / "x.jsonl", RECORDS))
    chat = MultipleChoice(chat=True).scorer(data, network)
    spelled = MultipleChoice(template="<{prompt}>:").scorer(data, network)
    np.testing.assert_array_equal(chat.losses(network), spelled.losses(network))
    assert not np.array_equal(chat.losses(network), MultipleChoice().scorer(data, network).losses(network))
    plain = task_data(write_speaker(tmp_path / "plain", "llama"), data.source.path)
    with pytest.raises(BadInput, match="no chat template; leave chat out"):
        MultipleChoice(chat=True).scorer(plain, network)


def test_a_long_prompt_loses_its_beginning(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "llama")
    network = load_speaker(folder)
    found = []
    for prompt in ("a prompt that is long", "is long"):
        rows = [{**RECORDS[0], "prompt": prompt}]
        data = task_data(folder, write_records(tmp_path / "x.jsonl", rows))
        found.append(MultipleChoice(max_length=7).scorer(data, network).losses(network))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "?"}, "no field 'prompt' or 'image'"),
        ({"prompt": "?", "answer": 0}, "'choices' is None; it must be a list of two texts or more"),
        ({"prompt": "?", "choices": ["a"], "answer": 0}, "must be a list of two"),
        ({"prompt": "?", "choices": ["a", 5], "answer": 0}, "must be a list of two"),
        ({"prompt": "?", "choices": ["a", "b"]}, "'answer' is None; it must be one of the 2 choices"),
        ({"prompt": "?", "choices": ["a", "b"], "answer": 2}, "'answer' is 2"),
        ({"prompt": "?", "choices": ["a", "b"], "answer": "C"}, "'answer' is 'C'"),
        ({"prompt": "?", "choices": ["a", "b"], "answer": True}, "'answer' is True"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "llama")
    data = task_data(folder, write_records(tmp_path / "x.jsonl", [RECORDS[0], record]))
    with pytest.raises(BadInput) as error:
        MultipleChoice().scorer(data, load_speaker(folder))
    assert str(error.value).startswith(f"{data.source.path}:2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_networks_are_no_speakers(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "bert")
    data = task_data(folder, write_records(tmp_path / "x.jsonl", RECORDS))
    with pytest.raises(BadInput, match="BertForMaskedLM is no language model"):
        MultipleChoice().scorer(data, load_speaker(folder))


def test_a_prompt_beyond_the_network_is_refused(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "gpt2")
    data = task_data(folder, write_records(tmp_path / "x.jsonl", [{**RECORDS[0], "prompt": "long " * 20}]))
    network = load_speaker(folder)
    with pytest.raises(BadInput, match=r"does not continue prompts of 100 tokens \(.*set max_length"):
        MultipleChoice().scorer(data, network).credits(network)


@pytest.mark.parametrize("settings", [{"template": "?"}, {"words": ["a"]}, {"max_length": 0}, {"normalise": "bytes"}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UnmergeableError):
        configure(MultipleChoice, settings)
