"""What polynomials are calibrated on, and how the result is judged: on data that was held out, and on other text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import unmergeable
from unmergeable.errors import BadInput, NotEquivalent
from unmergeable.network.encoding import Encoder
from unmergeable.optional import quiet
from unmergeable.protections.calibration import CALIBRATION_EXAMPLES, HELD_OUT_EXAMPLES, Calibration
from unmergeable.protections.general_text import GENERAL_TEXT

VOCABULARY = ["<unk>", "<s>", "</s>", *sorted({word for text in GENERAL_TEXT for word in text.split()})[:64]]


def ids(folder: Path, count: int) -> Path:
    np.savez(folder / f"{count}.npz", input_ids=np.random.default_rng(count).integers(3, 40, size=(count, 6)))
    return folder / f"{count}.npz"


@pytest.mark.parametrize(("count", "seen", "kept"), [(3, 3, 0), (8, 7, 1), (40, 35, 5), (128, 112, 16), (135, 128, 7)])
def test_some_are_held_out(count: int, seen: int, kept: int, tmp_path: Path) -> None:
    """Of many, those that come after the first 128; of few every eighth."""
    found = Calibration.of(ids(tmp_path, count), Encoder(tmp_path))
    assert (len(found.seen), len(found.kept)) == (seen, kept)
    both = [example.digest() for example in (*found.seen, *found.kept)]
    assert len(set(both)) == count, "every example is in one of the two"
    assert found.tokens == 6 * seen
    assert sum(len(batch) for batch in found.batches()) == seen
    assert sum(len(batch) for batch in found.held_out()) == kept
    assert found.general() == [], "ready inputs are no texts"


def test_no_more_than_is_needed_is_read(tmp_path: Path) -> None:
    found = Calibration.of(ids(tmp_path, 300), Encoder(tmp_path))
    assert (len(found.seen), len(found.kept)) == (CALIBRATION_EXAMPLES, HELD_OUT_EXAMPLES)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A base and its fine-tune, small GPT-2 with a tokenizer, and lines of text that it is used for."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=16, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    with quiet(transformers):
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
        made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
        tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "expert").mkdir()
    for file in (tmp_path / "base").iterdir():
        (tmp_path / "expert" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.dim() > 1:  # wide enough for the activation function to matter
            tensor *= 3 if "c_fc" in name else 1.5
        tensor += 0.01 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, tmp_path / "expert" / "model.safetensors", {"format": "pt"})
    random = np.random.default_rng(0)
    lines = [{"text": " ".join(random.choice(VOCABULARY[3:], size=12))} for _ in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def protect(work: Path, **options: Any) -> Any:
    given = {"base": work / "base", "out": work / "out", "method": "taylor_mlp", "data": work / "data.jsonl"}
    return unmergeable.protect(work / "expert", **{**given, **options})


def test_errors_say_what_they_hold_on(work: Path) -> None:
    result = protect(work)
    measured = result.to_json()["approximation"]
    assert (measured["examples"], measured["tokens"]) == (35, 35 * 12)
    assert measured["held_out"]["output_error"] > 0
    assert measured["general_text"]["output_error"] > 0
    text = "\n".join(result.lines())
    assert "Error of the network's output on data that was held out" in text
    assert "on text of other kinds" in text
    assert "Warning: it was calibrated on 420 tokens only" in text


def test_another_network_is_not_written(work: Path) -> None:
    """A polynomial of first order, whose tolerance lets anything pass, of a network that it does not resemble."""
    path = work / "expert" / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "mlp.c_proj.weight" in name or "mlp.c_fc.weight" in name:
            tensors[name] *= 20
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NotEquivalent, match=r"on held-out data the outputs are off by .* nothing was written"):
        protect(work, settings={"order": 1, "tolerance": 1e9})
    assert not (work / "out").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_an_expert_without_its_tokenizer_is_refused_and_takes_the_bases(work: Path, dry_run: bool) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (work / "expert" / name).unlink()
    with pytest.raises(BadInput, match=r"holds no (usable )?tokenizer"):
        protect(work, dry_run=dry_run)
    protect(work, dry_run=dry_run, encoder=work / "base")
