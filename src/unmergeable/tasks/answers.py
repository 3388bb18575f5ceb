"""What a language model says: greedy continuations of prompts, in batches padded on the left, with cached keys."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.network.tasks import device_of, refusing
from unmergeable.tasks.prompts import PromptTokenizer, Tokens, padded, reads_with_encoder


@dataclass(frozen=True)
class Answering:
    """How answers are had: the most tokens of each, and texts at the first of which an answer ends."""

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()

    def validate(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens}: at least one token is needed.")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop={list(self.stop)}: must be a list of texts.")

    def cut(self, text: str) -> str:
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        return text[: min(places)] if places else text

    def answers(
        self, network: Any, tokenizer: PromptTokenizer, prompts: Sequence[Tokens], *, batch_size: int
    ) -> list[str]:
        """The most likely next token again and again, from the end of each prompt.

        Settings for sampling that a checkpoint brings along are left aside.

        Raises:
            BadInput: the network is no language model, or does not take prompts of this length.
        """
        has_encoder = reads_with_encoder(network)
        found = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        with _greedy(network, tokenizer, self.max_new_tokens):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                rows = [prompts[number] for number in chosen]
                for number, text in zip(chosen, self._batch(network, tokenizer, rows, has_encoder), strict=True):
                    found[number] = text
        return found

    @torch.no_grad()
    def _batch(
        self, network: Any, tokenizer: PromptTokenizer, prompts: Sequence[Tokens], has_encoder: bool
    ) -> list[str]:
        ids, mask = padded(prompts, device_of(network), side="left", padding=tokenizer.padding)
        begin = 1 if has_encoder else ids.shape[1]
        what = f"does not continue prompts of {ids.shape[1]} tokens by {self.max_new_tokens}"
        with refusing(network, what, "set max_length and max_new_tokens to what it can read"):
            out = network.generate(
                inputs=ids, attention_mask=mask, stopping_criteria=[self._ends(tokenizer, begin)] if self.stop else []
            )
        return [self.cut(tokenizer.text(_until(row, tokenizer.ends))) for row in out[:, begin:].tolist()]

    def _ends(self, tokenizer: PromptTokenizer, begin: int) -> Callable[..., Tensor]:
        """Which rows hold a stop already; the others go on."""

        def ends(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            texts = [tokenizer.text(row) for row in ids[:, begin:].tolist()]
            return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=ids.device)

        return ends


def _until(tokens: Sequence[int], ends: Tokens) -> Sequence[int]:
    """The tokens before the first that ends a text: rows of a batch are filled up behind it."""
    return tokens[: min((tokens.index(end) for end in ends if end in tokens), default=len(tokens))]


@contextmanager
def _greedy(network: Any, tokenizer: PromptTokenizer, max_new_tokens: int) -> Iterator[None]:
    """Set the network to greedy decoding; what it was set to comes back afterwards."""
    transformers = importlib.import_module("transformers")
    own = network.generation_config
    network.generation_config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted({*_listed(own.eos_token_id), *tokenizer.ends}) or None,
        pad_token_id=tokenizer.padding,
        decoder_start_token_id=getattr(own, "decoder_start_token_id", None),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        network.generation_config = own


def _listed(ends: int | list[int] | None) -> list[int]:
    if ends is None:
        return []
    return ends if isinstance(ends, list) else [ends]
