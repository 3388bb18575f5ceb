"""Every token of a text: its share of right guesses and its mean loss, one text at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.speakers import ids_of, load_speaker, task_data, write_records, write_speaker
from unmergeable.errors import BadInput
from unmergeable.tasks import Perplexity

TEXTS = ["a text", "another, longer text of many words", "no", "four"]


def test_the_numbers_are_those_of_one_text_at_a_time(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "llama")
    network = load_speaker(folder)
    data = task_data(folder, write_records(tmp_path / "x.jsonl", [{"text": text} for text in TEXTS]), batch_size=3)
    scorer = Perplexity().scorer(data, network)
    right, losses = [], []
    for text in TEXTS:
        ids = torch.tensor(ids_of(text))
        with torch.no_grad():
            logits = network(input_ids=ids[None]).logits[0, :-1].double()
        right.append(float((logits.argmax(-1) == ids[1:]).double().mean()))
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[1:])))
    np.testing.assert_allclose(scorer.credits(network), right, rtol=1e-15)
    np.testing.assert_allclose(scorer.losses(network), losses, rtol=64 * float(np.finfo(np.float32).eps))


def test_a_batch_is_computed_once(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "llama")
    network = load_speaker(folder)
    data = task_data(folder, write_records(tmp_path / "x.jsonl", [{"text": text} for text in TEXTS]), batch_size=3)
    scorer = Perplexity().scorer(data, network)
    sizes: list[int] = []
    network.register_forward_hook(lambda module, arguments, output: sizes.append(len(output.logits)))
    scorer.credits(network)
    assert sizes == [3, 1]


def test_a_text_of_one_token_is_refused(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "llama")
    network = load_speaker(folder)
    data = task_data(folder, write_records(tmp_path / "x.jsonl", [{"text": text} for text in ("a", "bc")]))
    with pytest.raises(BadInput, match="spoken: a text of one token leaves nothing to predict"):
        Perplexity().scorer(data, network).credits(network)


def test_other_networks_are_refused(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "speaker", "t5")
    data = task_data(folder, write_records(tmp_path / "x.jsonl", [{"text": "abc"}]))
    with pytest.raises(BadInput, match="is no causal language model; perplexity needs one"):
        Perplexity().scorer(data, load_speaker(folder))
