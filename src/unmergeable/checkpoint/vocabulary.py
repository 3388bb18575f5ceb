"""The tokens of a checkpoint by the rows of its embedding, and tokenizer files with tokens added.

``tokenizer.json`` has them all: ``model.vocab`` (an object, or for unigram models a list) and ``added_tokens``. What
other files say (sentencepiece, ``vocab.json``) is not read: without ``tokenizer.json`` rows have numbers only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.disk import read_file
from unmergeable.checkpoint.header import strict_json
from unmergeable.errors import CheckpointError

TOKENIZER_NAME = "tokenizer.json"

_CONFIG_NAME = "tokenizer_config.json"
_OLD_NAME = "added_tokens.json"
_FILES = re.compile(
    r"tokenizer.*|sentencepiece.*|spiece.*|tekken.*|.*\.tiktoken|.*\.spm|bpe\.codes|special_tokens_map.*|added_tokens.*"
    r"|merges\..*|vocab\..*|chat_template.*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their rows; ``added`` are the entries of those that were added to the tokenizer's own, by token."""

    rows: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]

    @property
    def size(self) -> int:
        """One more than the last row that a token has."""
        return max(self.rows.values(), default=-1) + 1

    def by_row(self) -> dict[int, str]:
        return {row: token for token, row in self.rows.items()}


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer: they are taken over together or not at all."""
    return _FILES.fullmatch(name) is not None


def read_vocabulary(side_files: Mapping[str, Path]) -> Vocabulary | None:
    """The vocabulary among a checkpoint's files; None where there is no ``tokenizer.json`` that holds one.

    Raises:
        CheckpointError: the file cannot be read, or is no JSON.
    """
    path = side_files.get(TOKENIZER_NAME)
    document = None if path is None else strict_json(read_file(path), str(path))
    if not isinstance(document, dict) or not isinstance(model := document.get("model"), dict):
        return None
    try:
        rows = _own_tokens(model.get("vocab"))
        entries = [entry for entry in document.get("added_tokens") or () if isinstance(entry, dict)]
        added = {str(entry["content"]): entry for entry in entries}
        rows |= {token: int(entry["id"]) for token, entry in added.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: an entry of its vocabulary is malformed ({error}); download it again."
        ) from None
    return Vocabulary(rows, added) if rows else None


def _own_tokens(vocabulary: object) -> dict[str, int]:
    if isinstance(vocabulary, dict):
        return {str(token): int(row) for token, row in vocabulary.items()}
    if isinstance(vocabulary, list):
        return {str(entry[0]): row for row, entry in enumerate(vocabulary)}
    return {}


def united(vocabularies: Sequence[Vocabulary]) -> tuple[Vocabulary, dict[str, Mapping[str, Any]]]:
    """The first vocabulary with the tokens that only the others have behind it: first those of their own, then added.

    Returns:
        The vocabulary, and the entries of the new tokens, by token.
    """
    first, *others = vocabularies
    own = [token for other in others for token in _in_order(other) if token not in other.added]
    added = [(token, other.added[token]) for other in others for token in _in_order(other) if token in other.added]
    # What one tokenizer splits into, another has to be told whole: its text is normalised as any other.
    entries: dict[str, Mapping[str, Any]] = {token: _entry(token) for token in own if token not in first.rows}
    for token, entry in added:
        if token not in first.rows and token not in entries:
            entries[token] = entry
    entries = {token: {**entry, "id": first.size + place} for place, (token, entry) in enumerate(entries.items())}
    rows = dict(first.rows) | {token: int(entry["id"]) for token, entry in entries.items()}
    return Vocabulary(rows, {**first.added, **entries}), entries


def _in_order(vocabulary: Vocabulary) -> list[str]:
    return sorted(vocabulary.rows, key=vocabulary.rows.__getitem__)


def _entry(token: str) -> dict[str, Any]:
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }


def with_tokens(side_files: Mapping[str, Path], entries: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """The tokenizer files, by name, that change when these tokens are added; all others stay as they are."""
    document = json.loads(read_file(side_files[TOKENIZER_NAME]))
    document["added_tokens"] = [*(document.get("added_tokens") or ()), *map(_ordered, entries.values())]
    changed = {TOKENIZER_NAME: document}
    if _CONFIG_NAME in side_files:
        config = json.loads(read_file(side_files[_CONFIG_NAME]))
        if isinstance(config.get("added_tokens_decoder"), dict):
            config["added_tokens_decoder"] |= {str(entry["id"]): _without_row(entry) for entry in entries.values()}
            changed[_CONFIG_NAME] = config
    if _OLD_NAME in side_files:
        old = json.loads(read_file(side_files[_OLD_NAME]))
        changed[_OLD_NAME] = old | {token: entry["id"] for token, entry in entries.items()}
    return {name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode() for name, value in changed.items()}


def _ordered(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": entry["id"], **_without_row(entry)}


def _without_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "id"}


def shown_tokens(tokens: Iterable[str], most: int = 3) -> str:
    """A few tokens for a message."""
    listed = list(tokens)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(map(repr, listed[:most])) + more
