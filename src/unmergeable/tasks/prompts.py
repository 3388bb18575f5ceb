"""Prompts: from the records of a file to the tokens a language model continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unmergeable.data import DataSource, Example, Fields
from unmergeable.errors import BadInput, UsageError
from unmergeable.network.load import encoded_texts, load_tokenizer
from unmergeable.network.tasks import is_causal_language_model, is_encoder_decoder
from unmergeable.tasks.task_kind import TaskKind

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Prompted(TaskKind):
    """Settings of every kind of task that prompts a language model.

    Attributes:
        prompt: what the field with the question is called in the data.
        template: what the model is shown; ``{prompt}`` stands for the question. Worked examples go here.
        chat: whether the template is what a user says, put into the form of the tokenizer's chat template.
        max_length: the most tokens of a prompt; the beginning of a longer one is cut off.
    """

    prompt: str = "prompt"
    template: str = "{prompt}"
    chat: bool = False
    max_length: int = 2048

    def validate(self) -> None:
        if "{prompt}" not in self.template:
            raise UsageError(f"template={self.template!r}: has no {{prompt}}; say where the question goes.")
        if self.max_length < 1:
            raise UsageError(f"max_length={self.max_length}: at least one token is needed.")

    @property
    def fields(self) -> Fields:
        return Fields(text=self.prompt)

    def examples(self, source: DataSource) -> list[Example]:
        """The records of a source, whose content is the question. Raises BadInput for one without."""
        found = list(replace(source, fields=self.fields))
        for example in found:
            if not isinstance(example.content, str):
                raise BadInput(f"{example.origin}: no text under {self.prompt!r}; this kind of task asks questions.")
        return found

    def shown(self, example: Example) -> str:
        assert isinstance(example.content, str)
        return self.template.replace("{prompt}", example.content)

    def tokenizer(self, folder: Path) -> PromptTokenizer:
        return PromptTokenizer(folder, self.chat, self.max_length)


def text_of(example: Example, name: str) -> str:
    """The text under ``name`` in the record of an example.

    Raises:
        BadInput: there is none.
    """
    value = example.record.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadInput(f"{example.origin}: no text under {name!r}; every record needs one.")
    return value


def padded(rows: Sequence[Tokens], device: torch.device, *, side: str, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of tokens as int64 [rows, longest], filled up on one side, and the mask of what is not padding."""
    tensors = [torch.tensor(row, device=device) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_side=side, padding_value=padding)
    return ids, pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True, padding_side=side)


def reads_with_encoder(network: Any) -> bool:
    """Whether a language model reads prompts with an encoder of its own, and only continues them with a decoder.

    Raises:
        BadInput: it is no language model of transformers.
    """
    if is_causal_language_model(network):
        return False
    if is_encoder_decoder(network):
        return True
    raise BadInput(f"{type(network).__name__} is no language model; this kind of task needs one.")


@dataclass(frozen=True)
class Question:
    """Tokens a model is shown, and the continuations whose likelihood is wanted. None of them is empty."""

    prefix: Tokens
    continuations: tuple[Tokens, ...]


@dataclass(frozen=True)
class PromptTokenizer:
    """The tokenizer of a checkpoint folder, loaded when first needed. Code inside the folder is never run."""

    folder: Path
    chat: bool = False
    max_length: int = 2048

    def prompt(self, text: str, *, has_encoder: bool) -> Tokens:
        """The tokens of a prompt, the last ``max_length`` of them; at least one.

        Raises:
            BadInput: no tokenizer; or no chat template where one is wanted.
        """
        tokens = self._tokens(self._spoken(text))
        return ((tokens if has_encoder else self._without_end(tokens)) or self._beginning)[-self.max_length :]

    def question(self, text: str, continuations: Sequence[str], *, has_encoder: bool) -> Question:
        """A prompt and texts that may follow it.

        A tokenizer may join the end of a prompt and the beginning of a continuation in one token. So both are turned
        into tokens together, and the prefix is what all of them and the prompt alone have in common; for an encoder and
        a decoder they are apart anyway.

        Raises:
            BadInput: as :meth:`prompt` does; or a continuation without tokens.
        """
        if has_encoder:
            prefix = self.prompt(text, has_encoder=True)
            parts = [self._without_end(self._tokens(continuation)) for continuation in continuations]
        else:
            spoken = self._spoken(text)
            wholes = [self._without_end(self._tokens(spoken + continuation)) for continuation in continuations]
            shared = _shared_beginning([self._without_end(self._tokens(spoken)), *wholes])
            parts = [whole[len(shared) :] for whole in wholes]
            prefix = (shared or self._beginning)[-self.max_length :]
        for continuation, part in zip(continuations, parts, strict=True):
            if not part:
                raise BadInput(f"{self.folder}: its tokenizer makes nothing of {continuation!r}; give another answer.")
        return Question(prefix, tuple(parts))

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without the special ones."""
        decoded: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return decoded

    @property
    def ends(self) -> Tokens:
        """The token after which nothing follows; empty when the tokenizer has none."""
        end = self._tokenizer.eos_token_id
        return () if end is None else (int(end),)

    @property
    def padding(self) -> int:
        """A token to fill rows with; any will do, the mask hides it."""
        tokenizer = self._tokenizer
        return int(next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0))

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @property
    def _beginning(self) -> Tokens:
        """What a text without tokens before it begins with."""
        tokenizer = self._tokenizer
        return (int(next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)),)

    def _spoken(self, text: str) -> str:
        if not self.chat:
            return text
        try:
            spoken: str = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        except ValueError:
            raise BadInput(f"{self.folder}: its tokenizer has no chat template; leave chat out.") from None
        return spoken

    def _tokens(self, text: str) -> Tokens:
        # a chat template writes special tokens itself
        return tuple(encoded_texts(self._tokenizer, text, add_special_tokens=not self.chat)["input_ids"])

    def _without_end(self, tokens: Tokens) -> Tokens:
        """Some tokenizers end every text with a token that says so; what is to be continued must not."""
        return tokens[:-1] if not self.chat and tokens[-1:] == self.ends and self.ends else tokens


def _shared_beginning(rows: Sequence[Tokens]) -> Tokens:
    return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
