"""``multiple_choice``: of several answers, the one that a language model finds most likely after the question.

    score(choice) = log p(choice | prompt)             or divided by its tokens, or by its characters
    credit        = 1 if the right choice has the highest score
    loss          = -log softmax(scores)[right choice]

A record holds the question, its choices and which one is right: its number (the first is 0), its text, or its letter.
Classes are chosen by words as well: ``words`` are the choices of every record, and the answer is the class.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from unmergeable.data import Example
from unmergeable.errors import BadInput, UsageError
from unmergeable.tasks.likelihood import continuation_log_probabilities
from unmergeable.tasks.prompts import Prompted, Question, reads_with_encoder
from unmergeable.tasks.task_kind import Scores, TaskData

Normalisation = Literal["none", "tokens", "characters"]


@dataclass(frozen=True)
class MultipleChoice(Prompted):
    """Settings, besides those of every prompt.

    Attributes:
        choices, answer: what these fields are called in the data.
        words: choices of every record, instead of its own.
        separator: stands between the prompt and a choice; nothing does where an encoder reads the prompt.
        normalise: by what the log probability of a choice is divided.
    """

    name: ClassVar[str] = "multiple_choice"
    choices: str = "choices"
    answer: str = "answer"
    words: tuple[str, ...] = ()
    separator: str = " "
    normalise: Normalisation = "none"

    def validate(self) -> None:
        super().validate()
        if len(self.words) == 1 or not all(isinstance(word, str) and word for word in self.words):
            raise UsageError(f"words={list(self.words)}: must be two texts or more.")

    def scorer(self, data: TaskData, network: Any) -> ChoiceLikelihoods:
        """Raises BadInput for a record without a question, choices or an answer that is one of them."""
        tokenizer = self.tokenizer(data.encoder)
        has_encoder = reads_with_encoder(network)
        questions, right, lengths = [], [], []
        for example in self.examples(data.source):
            choices = list(self.words) or _choices(example, self.choices)
            right.append(_right(example, self.answer, choices))
            question = tokenizer.question(
                self.shown(example),
                [choice if has_encoder else self.separator + choice for choice in choices],
                has_encoder=has_encoder,
            )
            questions.append(question)
            lengths.append(self._lengths(question, choices))
        return ChoiceLikelihoods(questions, right, lengths, data.batch_size)

    def _lengths(self, question: Question, choices: Sequence[str]) -> Scores:
        if self.normalise == "tokens":
            return np.array([len(tokens) for tokens in question.continuations], float)
        if self.normalise == "characters":
            return np.array([len(choice) for choice in choices], float)
        return np.ones(len(choices))


@dataclass(frozen=True)
class ChoiceLikelihoods:
    """Questions with the number of the right choice, and what each choice's log probability is divided by."""

    questions: Sequence[Question]
    right: Sequence[int]
    lengths: Sequence[npt.NDArray[np.float64]]
    batch_size: int

    def __len__(self) -> int:
        return len(self.questions)

    def only(self, start: int, stop: int) -> ChoiceLikelihoods:
        chosen = slice(start, stop)
        return replace(self, questions=self.questions[chosen], right=self.right[chosen], lengths=self.lengths[chosen])

    def credits(self, network: Any) -> Scores:
        """1 where the right choice has the highest score; of equal ones the first counts."""
        chosen = [int(np.argmax(scores)) for scores in self._scores(network)]
        return np.array([float(choice == right) for choice, right in zip(chosen, self.right, strict=True)])

    def losses(self, network: Any) -> Scores:
        """The cross-entropy of the choices, their scores taken as logits."""
        return np.array(
            [
                float(np.logaddexp.reduce(scores) - scores[right])
                for scores, right in zip(self._scores(network), self.right, strict=True)
            ]
        )

    def _scores(self, network: Any) -> list[Scores]:
        found = continuation_log_probabilities(network, self.questions, batch_size=self.batch_size)
        return [scores / lengths for scores, lengths in zip(found, self.lengths, strict=True)]


def _choices(example: Example, name: str) -> list[str]:
    """The choices of a record: a list of texts, or (as in ARC) an object with such a list under ``text``."""
    value = example.record.get(name)
    if isinstance(value, dict):
        value = value.get("text")
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) and item for item in value):
        raise BadInput(f"{example.origin}: {name!r} is {value!r}; it must be a list of two texts or more.")
    return value


def _right(example: Example, name: str, choices: Sequence[str]) -> int:
    """The number of the right choice, given as such, as the text of a choice, or as a letter from A."""
    answer = example.record.get(name)
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if len(answer) == 1 and answer in string.ascii_uppercase:
            answer = string.ascii_uppercase.index(answer)
        elif answer.isdecimal():
            answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise BadInput(
            f"{example.origin}: {name!r} is {example.record.get(name)!r}; it must be one of the {len(choices)} "
            "choices, its number from 0, or its letter."
        )
    return answer
