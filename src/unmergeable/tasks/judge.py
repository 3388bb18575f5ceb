"""``judge``: a command of yours decides whose answer is better, the model's or the reference.

Every pair is shown twice, with either answer first, for judges favour a place. The command reads JSON lines

    {"id": 0, "prompt": "...", "first": "...", "second": "..."}

on standard input and writes one line for each, in any order, with the verdict ``first``, ``second`` or ``tie``:

    {"id": 0, "verdict": "first"}

The credit is 1 for a win, 1/2 for a tie and 0 otherwise, the mean of both orders; so the score is the win rate. With
the answers of another model as references it compares two models. The loss is that of the reference, by its tokens.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from unmergeable.errors import BadInput, UsageError
from unmergeable.tasks.answers import Answering
from unmergeable.tasks.likelihood import reference_losses
from unmergeable.tasks.prompts import Prompted, PromptTokenizer, Question, Tokens, reads_with_encoder, text_of
from unmergeable.tasks.task_kind import Scores, TaskData

WIN, TIE, LOSS = 1.0, 0.5, 0.0
_VERDICTS = ("first", "second", "tie")


@dataclass(frozen=True)
class Judge(Answering, Prompted):
    """Settings, besides those of every prompt and every answer.

    Attributes:
        command: the judge, as a list: a program and its arguments. It runs with your rights and environment.
        answer: what the field with the reference is called in the data.
        seconds: the most that the command may take for all pairs of a model.
        separator: stands between prompt and reference where the loss is taken.
    """

    name: ClassVar[str] = "judge"
    command: tuple[str, ...] = ()
    answer: str = "answer"
    seconds: float = 600.0
    separator: str = " "

    def validate(self) -> None:
        Prompted.validate(self)
        Answering.validate(self)
        if not self.command or not all(isinstance(word, str) for word in self.command):
            raise UsageError(f"command={list(self.command)}: must be a list of texts, a program and its arguments.")
        if self.seconds <= 0:
            raise UsageError(f"seconds={self.seconds}: must be positive.")

    def scorer(self, data: TaskData, network: Any) -> JudgedAnswers:
        """Raises BadInput for a record without a question or a reference."""
        tokenizer = self.tokenizer(data.encoder)
        has_encoder = reads_with_encoder(network)
        shown, prompts, references, questions = [], [], [], []
        for example in self.examples(data.source):
            shown.append(self.shown(example))
            references.append(text_of(example, self.answer))
            prompts.append(tokenizer.prompt(shown[-1], has_encoder=has_encoder))
            continuation = references[-1] if has_encoder else self.separator + references[-1]
            questions.append(tokenizer.question(shown[-1], [continuation], has_encoder=has_encoder))
        return JudgedAnswers(self, tokenizer, shown, prompts, references, questions, data.batch_size)

    def facts(self) -> Mapping[str, Any]:
        return {"command": list(self.command)}


@dataclass(frozen=True)
class JudgedAnswers:
    """Prompts as text and as tokens, with their reference answers."""

    settings: Judge
    tokenizer: PromptTokenizer
    shown: Sequence[str]
    prompts: Sequence[Tokens]
    references: Sequence[str]
    questions: Sequence[Question]
    batch_size: int

    def __len__(self) -> int:
        return len(self.prompts)

    def only(self, start: int, stop: int) -> JudgedAnswers:
        chosen = slice(start, stop)
        return replace(
            self,
            shown=self.shown[chosen],
            prompts=self.prompts[chosen],
            references=self.references[chosen],
            questions=self.questions[chosen],
        )

    def credits(self, network: Any) -> Scores:
        """How often the judge prefers the network's answer to the reference.

        Raises:
            UsageError: the command does not exist or may not be run.
            BadInput: it fails, takes too long, or does not give every verdict.
        """
        answers = self.settings.answers(network, self.tokenizer, self.prompts, batch_size=self.batch_size)
        return win_rates(self.settings.command, self.shown, answers, self.references, seconds=self.settings.seconds)

    def losses(self, network: Any) -> Scores:
        return reference_losses(network, self.questions, batch_size=self.batch_size)


def win_rates(
    command: Sequence[str], prompts: Sequence[str], answers: Sequence[str], others: Sequence[str], *, seconds: float
) -> Scores:
    """For each prompt how far a judge prefers ``answers`` to ``others``: 1, 1/2 or 0, the mean of both orders.

    Raises:
        UsageError: the command does not exist or may not be run.
        BadInput: it fails, takes longer than ``seconds``, or does not give every verdict.
    """
    pairs = [
        pair
        for prompt, one, other in zip(prompts, answers, others, strict=True)
        for pair in (
            {"prompt": prompt, "first": one, "second": other},
            {"prompt": prompt, "first": other, "second": one},
        )
    ]
    lines = [json.dumps({"id": number, **pair}) for number, pair in enumerate(pairs)]
    verdicts = _verdicts(_said(command, lines, seconds), len(pairs), command[0])
    wins = [
        TIE if verdict == "tie" else WIN if (verdict == "first") == (number % 2 == 0) else LOSS
        for number, verdict in enumerate(verdicts)
    ]
    rates: Scores = np.array(wins).reshape(-1, 2).mean(axis=1)
    return rates


def _said(command: Sequence[str], lines: Iterable[str], seconds: float) -> list[str]:
    try:
        done = subprocess.run(  # noqa: S603  the plan's author names the judge
            list(command), input="".join(f"{line}\n" for line in lines), capture_output=True, text=True, timeout=seconds
        )
    except OSError as error:
        raise UsageError(f"the judge {command[0]!r} cannot be run ({error.strerror}); correct its command.") from None
    except UnicodeDecodeError:
        raise BadInput(
            f"the judge {command[0]!r} writes something else than UTF-8; it must write JSON lines."
        ) from None
    except subprocess.TimeoutExpired:
        raise BadInput(f"the judge {command[0]!r} took more than {seconds:g} s; give it more in seconds.") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BadInput(f"the judge {command[0]!r} failed with exit code {done.returncode} ({reason}); repair it.")
    return [line for line in done.stdout.splitlines() if line.strip()]


def _verdicts(lines: Sequence[str], count: int, judge: str) -> list[str]:
    found: dict[int, str] = {}
    for place, line in enumerate(lines, start=1):
        try:
            document = json.loads(line)
            number, verdict = document["id"], document["verdict"]
        except (ValueError, TypeError, KeyError):
            raise BadInput(
                f"the judge {judge!r}, line {place}: {line[:60]!r} is no object with id and verdict; write one for "
                "each pair."
            ) from None
        if verdict not in _VERDICTS or number not in range(count) or number in found:
            raise BadInput(
                f"the judge {judge!r}, line {place}: id {number!r} with verdict {verdict!r}; each id from 0 to "
                f"{count - 1} gets one of {', '.join(_VERDICTS)} once."
            )
        found[number] = verdict
    if missing := [number for number in range(count) if number not in found]:
        raise BadInput(f"the judge {judge!r} gives no verdict on id {missing[0]}; it must on all {count}.")
    return [found[number] for number in range(count)]
