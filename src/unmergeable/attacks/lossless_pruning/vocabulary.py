"""Vocabularies in another order, or with more tokens: the rows of the base's tokens, where the base has them.

What belongs together is what the two ``tokenizer.json`` call by one name; nothing is compared of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.source import TensorSource

TOKENIZER = "tokenizer.json"

TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""Small files that say which number a token has."""


def token_order(release: TensorSource, base: TensorSource) -> Tensor | None:
    """For each of the base's rows the release's row of the same token, int64 [base's vocabulary].

    None where a tokenizer is missing, where the release lacks one of the base's tokens, or where no row would move.
    Rows that belong to no token (a vocabulary rounded up) stay in their places.
    """
    theirs, ours = (_token_ids(source.folder) for source in (base, release))
    rows, most = (source.config.get("vocab_size") for source in (base, release))
    if theirs is None or ours is None or not isinstance(rows, int) or not isinstance(most, int):
        return None
    if not theirs.keys() <= ours.keys() or max(theirs.values(), default=0) >= rows or most < rows:
        return None
    order = torch.arange(rows)
    for token, number in theirs.items():
        order[number] = ours[token]
    is_sound = int(order.max()) < most and len(order.unique()) == rows
    return order if is_sound and not (rows == most and torch.equal(order, torch.arange(rows))) else None


def _token_ids(folder: Path) -> Mapping[str, int] | None:
    """The number of every token that a ``tokenizer.json`` names; None where there is no such file, or it is damaged."""
    try:
        document = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # of Unigram models: tokens with their scores, in order
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in document.get("added_tokens") or ()}
        return {str(token): int(number) for token, number in {**vocabulary, **added}.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def vocabulary_axes(source: TensorSource, architecture: Architecture) -> Iterator[tuple[str, int]]:
    """The tensors with one row for each token, and the axis of the rows: embeddings, output heads and their biases."""
    size = source.config.get("vocab_size")
    for stream in (*architecture.residuals, *architecture.exposed):
        for axis in stream.axes:
            shape = source.spec(axis.tensor).shape if axis.tensor in source.index.entries else ()
            if len(shape) == 2 and shape[1 - axis.axis] == size and axis.variance != "gain":
                yield axis.tensor, 1 - axis.axis
    for name in source.names:
        if source.spec(name).shape == (size,) and ("lm_head" in name or "predictions" in name):
            yield name, 0


def reordered(state: dict[str, Tensor], axes: Mapping[str, int], order: Tensor) -> None:
    """Put the rows of the tensors ``axes`` names into ``order``, in place."""
    for name, axis in axes.items():
        state[name] = state[name].index_select(axis, order).contiguous()
