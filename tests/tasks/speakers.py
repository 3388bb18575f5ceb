"""Random language models with a tokenizer of single characters, and records in files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unmergeable.data import DataSource
from unmergeable.network.load import load_network
from unmergeable.tasks import TaskData
from zoo import TOYS, VOCABULARY, write_toy

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,:;?!#$-+*/=()[]{}<>'\"_"
CHAT = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"


def write_speaker(folder: Path, toy: str, *, seed: int = 0, chat: bool = False) -> Path:
    """A random network of this family, and a tokenizer that knows its vocabulary by heart."""
    write_toy(TOYS[toy], folder, seed=seed)
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return folder


def ids_of(text: str) -> list[int]:
    return [CHARACTERS.index(character) + 3 for character in text]


def text_of(ids: Iterable[int]) -> str:
    return "".join(CHARACTERS[number - 3] for number in ids if 3 <= number < 3 + len(CHARACTERS))


def write_records(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_data(folder: Path, records: Path, *, batch_size: int = 8) -> TaskData:
    return TaskData("spoken", DataSource(records), folder, batch_size)


def load_speaker(folder: Path) -> Any:
    return load_network(folder)
