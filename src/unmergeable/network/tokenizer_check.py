"""Whether a tokenizer is one: transformers makes an empty one, without a word, for a folder that has none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmergeable.errors import BadInput

_TRIED = 32  # ordinary tokens that are written out and read again
_REMEDY = "copy the tokenizer files of the base into it, or say with --encoder (encoder=) in which folder they are"


def require_usable(tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer that cannot be that of the network in ``folder``.

    Raises:
        BadInput: it knows special tokens only, more tokens than the network has rows, or does not read what it wrote.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    ordinary = sorted(set(vocabulary.values()) - set(tokenizer.all_special_ids))
    if not ordinary:
        raise BadInput(
            f"{folder} holds no tokenizer: what transformers makes of it knows {len(vocabulary)} special tokens and no "
            f"other; {_REMEDY}."
        )
    rows = _rows(folder)
    if rows is not None and max(vocabulary.values()) >= rows:
        raise BadInput(
            f"the tokenizer of {folder} has {max(vocabulary.values()) + 1} tokens and its config.json says vocab_size "
            f"{rows}: it is another model's; {_REMEDY}."
        )
    some = ordinary[:: max(1, len(ordinary) // _TRIED)][:_TRIED]
    read = tokenizer(tokenizer.decode(some), add_special_tokens=False)["input_ids"]
    if not any(number in vocabulary.values() and number != tokenizer.unk_token_id for number in read):
        raise BadInput(f"the tokenizer of {folder} does not read what it writes itself; {_REMEDY}.")


def _rows(folder: Path) -> int | None:
    """The rows of the network's embedding, where its configuration says."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for part in (config, config.get("text_config")) if isinstance(config, dict) else ():
        if isinstance(part, dict) and type(part.get("vocab_size")) is int:
            return int(part["vocab_size"])
    return None
