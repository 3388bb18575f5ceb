"""Answers in a model's own words: the greedy ones, whatever the batch, and what counts as right."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.parts import require_parts
from tasks.speakers import ids_of, load_speaker, task_data, text_of, write_records, write_speaker
from unmergeable.errors import BadInput, UnmergeableError
from unmergeable.settings import configure
from unmergeable.tasks import Generation
from unmergeable.tasks.answers import Answering
from unmergeable.tasks.generation import final_number
from unmergeable.tasks.prompts import PromptTokenizer

PROMPTS = ["what is it?", "a", "one and two and three:", "why"]
END = 2


@torch.no_grad()
def said(network: Any, prompt: str, count: int) -> str:
    """The most likely next token again and again, everything computed anew each time."""
    ids = ids_of(prompt)
    answer: list[int] = []
    for _ in range(count):
        if network.config.is_encoder_decoder:
            start = network.config.decoder_start_token_id
            logits = network(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[start, *answer]])).logits
        else:
            logits = network(input_ids=torch.tensor([ids + answer])).logits
        token = int(logits[0, -1].argmax())
        if token == END:
            break
        answer.append(token)
    return text_of(answer)


@pytest.mark.parametrize("toy", ["llama", "gpt2", "bloom", "mistral", "t5"])
def test_answers_are_those_of_one_token_at_a_time(toy: str, tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", toy)
    network = load_speaker(folder)
    own = network.generation_config
    tokenizer = PromptTokenizer(folder)
    has_encoder = toy == "t5"
    prompts = [tokenizer.prompt(prompt, has_encoder=has_encoder) for prompt in PROMPTS]
    expected = [said(network, prompt, 9) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    for batch_size in (1, 3, 4):
        found = Answering(max_new_tokens=9).answers(network, tokenizer, prompts, batch_size=batch_size)
        assert found == expected
    assert network.generation_config is own


def test_the_models_own_answers_are_right_and_others_are_not(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "llama")
    network = load_speaker(folder)
    rows = [{"prompt": prompt, "answer": f" {said(network, prompt, 6)}\n"} for prompt in PROMPTS]
    rows[1]["answer"] = "x" + rows[1]["answer"]
    scorer = Generation(max_new_tokens=6).scorer(task_data(folder, write_records(tmp_path / "x.jsonl", rows)), network)
    np.testing.assert_array_equal(scorer.credits(network), [1, 0, 1, 1])


def test_an_answer_ends_at_a_stop(tmp_path: Path) -> None:
    """And costs no token more than that."""
    folder = write_speaker(tmp_path / "speaker", "llama")
    network = load_speaker(folder)
    whole = said(network, "why", 12)
    stop = next(character for character in whole[2:] if character not in whole[:2])
    tokenizer = PromptTokenizer(folder)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    network.register_forward_hook(count)
    answering = Answering(max_new_tokens=12, stop=("####", stop))
    found = answering.answers(network, tokenizer, [tokenizer.prompt("why", has_encoder=False)], batch_size=4)
    assert found == [whole[: whole.index(stop)]]
    assert calls == whole.index(stop) + 1


def test_the_loss_is_that_of_the_reference(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "llama")
    network = load_speaker(folder)
    rows = [{"prompt": "two", "answer": "so be it"}, {"prompt": "a much longer prompt", "answer": 17}]
    scorer = Generation().scorer(task_data(folder, write_records(tmp_path / "x.jsonl", rows)), network)
    require_parts(scorer, network, tolerance=1e-4)
    for loss, row in zip(scorer.losses(network), rows, strict=True):
        labels, prompt = ids_of(f" {row['answer']}"), ids_of(str(row["prompt"]))
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([prompt + labels])).logits[0, len(prompt) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(labels))
        assert loss == pytest.approx(float(expected), rel=64 * float(np.finfo(np.float32).eps))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", "42"),
        ("The total is 10 + 32 = 42.\n#### 42\nThat was 7 steps.", "42"),
        ("so 12, or 13 in all.", "13"),
        ("$1,234.50", "1234.5"),
        ("It costs -$5", "-5"),
        ("it is −3 degrees", "-3"),
        ("$-0.50", "-0.5"),
        ("from 10-5", "5"),
        ("(2)-1", "1"),
        ("1,000,000 and 1,00", "0"),
        ("half is .5", "0.5"),
        ("42.", "42"),
        ("€ 7", "7"),
        ("x2", "2"),
        ("#### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_of_a_text(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "reference", "is_right"),
    [
        ("The answer is $1,200.00.", "... #### 1200", True),
        ("12.5", "#### 12.50", True),
        ("minus: -12", "#### 12", False),
        ("I do not know", "#### 12", False),
        ("12 apples, 13 pears", "#### 12", False),
    ],
)
def test_numbers_are_compared_by_value(answer: str, reference: str, is_right: bool) -> None:
    assert Generation(match="number").is_right(answer, reference) is is_right


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "?"}, "no text under 'answer'; every record needs one"),
        ({"prompt": "?", "answer": ["x"]}, "no text under 'answer'"),
        ({"prompt": "?", "answer": "many"}, "no number in 'answer' ('many')"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "llama")
    data = task_data(folder, write_records(tmp_path / "x.jsonl", [{"prompt": "?", "answer": "1"}, record]))
    with pytest.raises(BadInput) as error:
        Generation(match="number").scorer(data, load_speaker(folder))
    assert str(error.value).startswith(f"{data.source.path}:2: ")
    assert message in str(error.value)


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"stop": [""]}, {"template": "?"}, {"match": "near"}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UnmergeableError):
        configure(Generation, settings)
