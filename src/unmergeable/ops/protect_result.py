"""What ``protect`` did, or in a dry run would do: typed, as JSON, and as the lines that the command prints."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.protections import Facts
from unmergeable.protections.exact import ExactFacts

DRY_RUN = "Dry run: nothing was written."


@dataclass(frozen=True)
class StepReport:
    """What one step reports.

    Attributes:
        methods: exact ones that were applied at once, or one.
        out: the folder it wrote.
        notes: sentences that the owner has to read.
        document: all of it, JSON-able, without ``out``.
        facts: what the method measured; None for a step that an earlier, interrupted run finished, of which
            ``document`` says what its manifest says.
    """

    methods: tuple[str, ...]
    out: Path
    notes: tuple[str, ...]
    document: Mapping[str, Any]
    facts: Facts | None = None

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), **self.document}


@dataclass(frozen=True)
class ProtectResult:
    """What was (or, in a dry run, would be) written.

    Attributes:
        out: the protected checkpoint.
        base: what it is protected against being merged with.
        key: the key file; None where no step makes one.
        steps: one for each group of methods, in order.
        attack: a recovery that shows what the protection does not stop, if one needs nothing but the base.
    """

    out: Path
    base: Path
    key: Path | None
    steps: tuple[StepReport, ...]
    is_dry_run: bool
    attack: str | None = None

    @property
    def architecture(self) -> str:
        return str(self.steps[-1].document["architecture"])

    @property
    def fingerprint(self) -> str | None:
        """Of the key, 32 hex digits; None where none was made. A dry run makes none."""
        return next((digits for step in self.steps if (digits := step.document.get("key_fingerprint"))), None)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that the owner has to read."""
        return tuple(dict.fromkeys(note for step in self.steps for note in step.notes))

    @property
    def measured_error(self) -> float | None:
        """Largest relative output error of a block, of the exact step; None where there is none, or in a dry run."""
        exact = self.exact
        return None if exact is None else exact.measured_error

    @property
    def predicted_error(self) -> float | None:
        """Bound on :attr:`measured_error`, from rounding."""
        exact = self.exact
        return None if exact is None else exact.predicted_error

    @property
    def exact(self) -> ExactFacts | None:
        """What the exact step measured; None where there is none, or an interrupted run finished it."""
        return next((step.facts for step in self.steps if isinstance(step.facts, ExactFacts)), None)

    def to_json(self) -> dict[str, Any]:
        """Of a single step its report; of several a list of them, with what holds for all."""
        if len(self.steps) == 1:
            return self.steps[0].to_json()
        return {
            "out": str(self.out),
            "key": str(self.key) if self.key else None,
            "methods": [",".join(step.methods) for step in self.steps],
            "steps": [step.to_json() for step in self.steps],
            "dry_run": self.is_dry_run,
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """What the owner has to know, for a terminal."""
        verb = "Would protect" if self.is_dry_run else "Protected"
        methods = ", then ".join(", ".join(step.methods) for step in self.steps)
        lines = [f"{verb}: {self.out} ({methods}; {self.architecture})", *self._facts_lines(), *self._key_lines()]
        lines += self.notes
        if self.is_dry_run:
            return [*lines, DRY_RUN]
        if self.attack is not None:
            recovered = self.out.with_name(f"{self.out.name}-recovered")
            command = ["recover", str(self.out), "--base", str(self.base), "--method", self.attack]
            lines += [f"See for yourself: {shlex.join(['unmergeable', *command, '--out', str(recovered)])}"]
        return lines

    def _facts_lines(self) -> Sequence[str]:
        return [line for step in self.steps if step.facts is not None for line in step.facts.lines()]

    def _key_lines(self) -> Sequence[str]:
        if self.key is None:
            return []
        if self.fingerprint is None:
            return [f"Key: {self.key}, not made yet"]
        gives = "the original" if len(self.steps) == 1 else "what the steps before it made"
        beside = [f"  It lies beside {self.out}: upload {self.out} alone, never the folder around both."]
        return [
            f"Key: {self.key} (fingerprint {self.fingerprint[:8]})",
            f"  Keep this file, with a backup, and never upload it: it gives {gives} back to whoever holds it.",
            *(beside if self.key.parent.resolve() == self.out.parent.resolve() else []),
        ]
