"""``code``: a language model writes a Python function, and unit tests decide (HumanEval, Chen et al. 2021: pass@1).

    program = prompt + answer + tests + check(entry_point)        credit = 1 if it runs to its end without an error

One greedy answer for each record. Every program runs in a process of its own (:mod:`unmergeable.tasks.sandbox`, which
says what that does and does not keep it from). An answer in a fence of ``` counts without what is around it, and one
that defines the function itself stands for the prompt, whose imports are kept. The loss is that of the record's own
solution, by its tokens; NaN where the record has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from unmergeable.data import Example
from unmergeable.errors import BadInput
from unmergeable.tasks.answers import Answering
from unmergeable.tasks.likelihood import reference_losses
from unmergeable.tasks.prompts import Prompted, PromptTokenizer, Question, Tokens, reads_with_encoder, text_of
from unmergeable.tasks.sandbox import Isolation, Limits, available_isolation, run_program
from unmergeable.tasks.task_kind import Scores, TaskData

_FENCE = re.compile(r"```[^\n]*\n(.*?)(?:\n```|$)", re.DOTALL)


@dataclass(frozen=True)
class Code(Answering, Prompted):
    """Settings, besides those of every prompt and every answer.

    Attributes:
        tests, entry_point, solution: what these fields are called in the data. Tests are a text or a list of lines;
            where a record has an entry point, they define ``check``, which is called with it.
        stop: ends an answer; in a chat, where answers are not continuations, nothing does.
        isolation: whether to refuse systems that do not let programs be isolated, or to try, or not even that.
        seconds, memory_megabytes, processes: the most that one program may use.
    """

    name: ClassVar[str] = "code"
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ("\nclass ", "\ndef ", "\n#", "\nif __name__", "\nprint(")
    tests: str = "test"
    entry_point: str = "entry_point"
    solution: str = "canonical_solution"
    isolation: Isolation = "required"
    seconds: float = 10.0
    memory_megabytes: int = 1024
    processes: int = 16

    def validate(self) -> None:
        """Raises UsageError for settings out of range."""
        Prompted.validate(self)
        Answering.validate(self)
        self.limits.validate()

    @property
    def limits(self) -> Limits:
        """Of one program."""
        return Limits(self.seconds, self.memory_megabytes, processes=self.processes)

    def scorer(self, data: TaskData, network: Any) -> WrittenCode:
        """Raises BadInput for a record without a prompt or tests, UsageError where programs cannot be isolated."""
        run_program("", self.limits, isolation=self.isolation)  # before a model is asked anything
        tokenizer = self.tokenizer(data.encoder)
        has_encoder = reads_with_encoder(network)
        exercises, prompts = [], []
        questions: list[Question | None] = []
        for example in self.examples(data.source):
            shown = self.shown(example)
            exercises.append(_exercise(example, self))
            prompts.append(tokenizer.prompt(shown, has_encoder=has_encoder))
            solution = example.record.get(self.solution)
            questions.append(
                tokenizer.question(shown, [solution], has_encoder=has_encoder) if isinstance(solution, str) else None
            )
        return WrittenCode(self, tokenizer, exercises, prompts, questions, data.batch_size)

    def facts(self) -> Mapping[str, Any]:
        """Which parts of the isolation were active, and what none of them keeps a program from."""
        return {
            "isolation": [] if self.isolation == "none" else list(available_isolation()),
            "not_isolated": "programs could read the files of the user, and met the kernel of the machine",
        }


@dataclass(frozen=True)
class Exercise:
    """What a model was asked to write, and the text of the tests. ``entry_point`` is empty where tests name it."""

    prompt: str
    tests: str
    entry_point: str

    def program(self, answer: str) -> str:
        """The program that decides over an answer."""
        fenced = _FENCE.search(answer)
        written = fenced[1] if fenced else answer
        is_whole = not self.entry_point or re.search(rf"^\s*def {re.escape(self.entry_point)}\b", written, re.MULTILINE)
        begin = _imports(self.prompt) if is_whole else self.prompt
        call = f"check({self.entry_point})\n" if self.entry_point else ""
        return f"{begin}{written}\n\n{self.tests}\n{call}"


@dataclass(frozen=True)
class WrittenCode:
    """Exercises with their prompts; a question is None where a record has no solution."""

    settings: Code
    tokenizer: PromptTokenizer
    exercises: Sequence[Exercise]
    prompts: Sequence[Tokens]
    questions: Sequence[Question | None]
    batch_size: int

    def credits(self, network: Any) -> Scores:
        """1 where the tests pass."""
        answering = replace(self.settings, stop=()) if self.settings.chat else self.settings
        answers = answering.answers(network, self.tokenizer, self.prompts, batch_size=self.batch_size)
        programs = [exercise.program(answer) for exercise, answer in zip(self.exercises, answers, strict=True)]
        settings = self.settings
        outcomes = [run_program(program, settings.limits, isolation=settings.isolation) for program in programs]
        return np.array([float(outcome.has_ended) for outcome in outcomes])

    def losses(self, network: Any) -> Scores:
        """How unlikely the record's own solution is, per token."""
        losses = np.full(len(self.questions), np.nan)
        known = [number for number, question in enumerate(self.questions) if question is not None]
        asked = [question for question in self.questions if question is not None]
        if known:
            losses[known] = reference_losses(network, asked, batch_size=self.batch_size)
        return losses


def _exercise(example: Example, settings: Code) -> Exercise:
    assert isinstance(example.content, str)
    tests = example.record.get(settings.tests)
    if isinstance(tests, list) and tests and all(isinstance(line, str) for line in tests):
        tests = "\n".join(tests)
    if not isinstance(tests, str) or not tests.strip():
        raise BadInput(f"{example.origin}: no tests under {settings.tests!r}; every record needs some.")
    has_entry = settings.entry_point in example.record
    entry = text_of(example, settings.entry_point) if has_entry else ""
    if has_entry and not entry.isidentifier():
        raise BadInput(f"{example.origin}: {settings.entry_point!r} is {entry!r}; it must be the name of a function.")
    return Exercise(example.content, tests, entry)


def _imports(prompt: str) -> str:
    return "".join(line for line in prompt.splitlines(keepends=True) if line.startswith(("import ", "from ")))
