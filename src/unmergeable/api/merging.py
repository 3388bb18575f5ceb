"""Merge: what a free-rider does with your checkpoint and theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges import MERGES, engine
from unmergeable.progress import Progress, silent
from unmergeable.settings import configure, nearest, settings_of


@dataclass(frozen=True)
class MergeResult:
    """What was merged, with which coefficients."""

    out: Path
    method: str
    settings: Mapping[str, Any]
    experts: tuple[tuple[str, float], ...]
    tensors: int

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "method": self.method,
            "settings": dict(self.settings),
            "experts": [{"path": path, "coefficient": coefficient} for path, coefficient in self.experts],
            "tensors": self.tensors,
        }


def merge(
    *,
    experts: Sequence[tuple[Path, float | None]],
    method: str,
    out: Path,
    base: Path | None = None,
    settings: Mapping[str, object] | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> MergeResult:
    """Merge experts of one base into a new checkpoint.

    Args:
        experts: folders with their coefficient, or None for the method's default.
        method: a merge (``methods`` lists them).
        out: folder to create.
        base: the common base; not needed by ``linear``.

    Raises:
        UsageError: unknown method or setting, a coefficient the method cannot use, too few experts.
        Mismatch: the checkpoints do not belong together; names the tensor.
    """
    if method not in MERGES:
        raise UsageError(f"no merge is called {method!r}{nearest(method, MERGES)}")
    configured = configure(MERGES[method], settings or {})
    if base is not None and not base.exists():
        raise BadInput(
            f"base {base} does not exist; give the folder of the checkpoint the experts were fine-tuned from."
        )
    base_source = None if base is None else open_checkpoint(base)
    sources = [(open_checkpoint(path, base=base), coefficient) for path, coefficient in experts]
    engine.merge(base_source, sources, configured, out, threads=threads, progress=progress)
    coefficients = configured.resolve([coefficient for _, coefficient in experts])
    used = tuple((str(path), value) for (path, _), value in zip(experts, coefficients, strict=True))
    return MergeResult(out, method, settings_of(configured), used, len(sources[0][0].names))
