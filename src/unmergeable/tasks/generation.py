"""``generation``: a language model answers in its own words, and the answer is right or not.

    match = exact    the answer is the reference, blanks at both ends aside
    match = number   the number the answer comes to is that of the reference (GSM8K, Cobbe et al. 2021)

The number of a text is what stands behind ``####``, or the last one in it. The loss is that of the reference answer,
-log p(reference | prompt), by its tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, ClassVar, Literal

import numpy as np

from unmergeable.errors import BadInput
from unmergeable.tasks.answers import Answering
from unmergeable.tasks.likelihood import reference_losses
from unmergeable.tasks.prompts import Prompted, PromptTokenizer, Question, Tokens, reads_with_encoder, text_of
from unmergeable.tasks.task_kind import Scores, TaskData

Match = Literal["exact", "number"]

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-−])?\s?[$€£¥]?\s?(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)
"""A minus behind a word or a digit is a hyphen or a difference, not a sign."""

_FINAL = "####"


@dataclass(frozen=True)
class Generation(Answering, Prompted):
    """Settings, besides those of every prompt and every answer.

    Attributes:
        answer: what the field with the reference is called in the data.
        match: when an answer is right.
        separator: stands between prompt and reference where the loss is taken.
    """

    name: ClassVar[str] = "generation"
    answer: str = "answer"
    match: Match = "exact"
    separator: str = " "

    def validate(self) -> None:
        Prompted.validate(self)
        Answering.validate(self)

    def scorer(self, data: TaskData, network: Any) -> GeneratedAnswers:
        """Raises BadInput for a record without a question or a reference, or one without a number where one counts."""
        tokenizer = self.tokenizer(data.encoder)
        has_encoder = reads_with_encoder(network)
        prompts, references, questions = [], [], []
        for example in self.examples(data.source):
            reference = text_of(example, self.answer)
            if self.match == "number" and final_number(reference) is None:
                raise BadInput(f"{example.origin}: no number in {self.answer!r} ({reference!r}); correct the record.")
            shown = self.shown(example)
            prompts.append(tokenizer.prompt(shown, has_encoder=has_encoder))
            references.append(reference)
            continuation = reference if has_encoder else self.separator + reference
            questions.append(tokenizer.question(shown, [continuation], has_encoder=has_encoder))
        return GeneratedAnswers(self, tokenizer, prompts, references, questions, data.batch_size)

    def is_right(self, answer: str, reference: str) -> bool:
        if self.match == "exact":
            return answer.strip() == reference.strip()
        number = final_number(answer)
        return number is not None and number == final_number(reference)


@dataclass(frozen=True)
class GeneratedAnswers:
    """Prompts with their reference answers."""

    settings: Generation
    tokenizer: PromptTokenizer
    prompts: Sequence[Tokens]
    references: Sequence[str]
    questions: Sequence[Question]
    batch_size: int

    def __len__(self) -> int:
        return len(self.prompts)

    def only(self, start: int, stop: int) -> GeneratedAnswers:
        chosen = slice(start, stop)
        return replace(
            self, prompts=self.prompts[chosen], references=self.references[chosen], questions=self.questions[chosen]
        )

    def credits(self, network: Any) -> Scores:
        """1 where the answer is right."""
        answers = self.settings.answers(network, self.tokenizer, self.prompts, batch_size=self.batch_size)
        pairs = zip(answers, self.references, strict=True)
        return np.array([float(self.settings.is_right(answer, reference)) for answer, reference in pairs])

    def losses(self, network: Any) -> Scores:
        return reference_losses(network, self.questions, batch_size=self.batch_size)


def final_number(text: str) -> Decimal | None:
    """The first number behind the last ``####``, or else the last number of a text; None when it has none.

    Commas between thousands, signs of currencies and a full stop at the end are no part of it.
    """
    _, mark, behind = text.rpartition(_FINAL)
    found = list(_NUMBER.finditer(behind if mark else text))
    if not found:
        return None
    match = found[0] if mark else found[-1]
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["sign"] else value
