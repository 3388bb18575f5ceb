"""What a merge made, for programs and for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Backend = Literal["own", "mergekit"]


@dataclass(frozen=True)
class MergeResult:
    """What was merged, with which coefficients: None where they differ from tensor to tensor.

    ``learnt`` is what a merge learnt from data, None where it took none, and ``summary`` says so in a line. ``notes``
    say what differed between the models, and what became of it.
    """

    out: Path
    method: str
    settings: Mapping[str, Any]
    experts: tuple[tuple[str, float | None], ...]
    tensors: int
    backend: Backend = "own"
    learnt: Mapping[str, Any] | None = None
    summary: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "method": self.method,
            "backend": self.backend,
            "settings": dict(self.settings),
            "experts": [{"path": path, "coefficient": coefficient} for path, coefficient in self.experts],
            "tensors": self.tensors,
            "learnt": None if self.learnt is None else dict(self.learnt),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The result for a terminal."""
        by = " by mergekit" if self.backend == "mergekit" else ""
        return [
            f"Merged{by}: {self.out} ({self.method}; {self.tensors} tensors)",
            *(f"  {path}" if value is None else f"  {value:g} of {path}" for path, value in self.experts),
            *([f"  {self.summary}"] if self.summary else []),
            *(f"Note: {note}" for note in self.notes),
        ]
