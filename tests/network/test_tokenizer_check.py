"""A tokenizer that is none, another model's, or one that does not read what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from unmergeable.errors import BadInput
from unmergeable.network.load import load_tokenizer
from unmergeable.optional import quiet

WORDS = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(20))]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


def write(folder: Path, words: list[str] | None, rows: int = 23) -> Path:
    """A folder with the config of a network of so many rows, and a tokenizer of these words."""
    with quiet(transformers):
        transformers.LlamaConfig(vocab_size=rows, **SIZES).save_pretrained(folder)
        if words is not None:
            made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
            made.pre_tokenizer = pre_tokenizers.Whitespace()
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
            ).save_pretrained(folder)
    return folder


def test_one_that_fits(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "network", WORDS))
    assert tokenizer("word3 word5", add_special_tokens=False)["input_ids"] == [6, 8]
    # More rows than tokens is usual: rows are padded to a multiple.
    load_tokenizer(write(tmp_path / "padded", WORDS, rows=64))


REFUSED: dict[str, tuple[list[str] | None, int, str]] = {
    "none in the folder": (
        None,
        23,
        "holds no tokenizer: what transformers makes of it knows|holds no usable tokenizer",
    ),
    "special tokens only": (WORDS[:3], 23, "knows 3 special tokens and no other"),
    "another model's": (WORDS, 20, r"has 23 tokens and its config\.json says vocab_size 20: it is another model's"),
}


@pytest.mark.parametrize(("words", "rows", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_tokenizer_of_the_network(words: list[str] | None, rows: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        load_tokenizer(write(tmp_path / "network", words, rows))
    if words is not None:
        assert "--encoder" in str(caught.value)


def test_one_that_does_not_read_what_it_writes(tmp_path: Path) -> None:
    folder = write(tmp_path / "network", WORDS)
    path = folder / "tokenizer.json"
    document: dict[str, Any] = json.loads(path.read_text())
    document["pre_tokenizer"] = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(document))
    with pytest.raises(BadInput, match="does not read what it writes itself"):
        load_tokenizer(folder)


def test_rows_of_a_part_for_texts_count(tmp_path: Path) -> None:
    folder = write(tmp_path / "network", WORDS)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["vocab_size"]
    path.write_text(json.dumps(config | {"text_config": {"vocab_size": 10}}))
    from unmergeable.network.tokenizer_check import require_usable

    with quiet(transformers):
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    with pytest.raises(BadInput, match="vocab_size 10"):
        require_usable(tokenizer, folder)
