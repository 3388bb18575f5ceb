"""Recover: what an attacker who holds the base does to a protected checkpoint before merging it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

from unmergeable.api.opened import open_base, open_with_architecture
from unmergeable.api.workers import one_thread_per_kernel
from unmergeable.checkpoint.rewrite import output_like, rewrite
from unmergeable.errors import UsageError
from unmergeable.gauge.act import edits
from unmergeable.progress import Progress, silent
from unmergeable.recoveries import RECOVERIES
from unmergeable.settings import configure, nearest, settings_of


@dataclass(frozen=True)
class RecoverResult:
    """Distances are relative Frobenius norms over the attention tensors: ‖W − W_base‖ / ‖W_base‖.

    ``confidence``: from 0 (what fitting an unrelated base gives) to 1 (the base itself).
    """

    out: Path
    method: str
    settings: Mapping[str, Any]
    distance_before: float
    distance_after: float
    confidence: float
    parts: tuple[Mapping[str, Any], ...]
    cpu_seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "method": self.method,
            "settings": dict(self.settings),
            "distance_before": self.distance_before,
            "distance_after": self.distance_after,
            "confidence": self.confidence,
            "cpu_seconds": self.cpu_seconds,
            "parts": [dict(part) for part in self.parts],
        }


def recover(
    protected: Path,
    *,
    base: Path,
    method: str,
    out: Path,
    settings: Mapping[str, object] | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> RecoverResult:
    """Estimate and undo a protection with nothing but the base; the result computes what ``protected`` computes.

    Raises:
        UsageError: unknown recovery or setting.
        Mismatch: ``base`` is not the base of ``protected``'s architecture.
    """
    if method not in RECOVERIES:
        raise UsageError(f"no recovery is called {method!r}{nearest(method, RECOVERIES)}")
    configured = configure(RECOVERIES[method], settings or {})
    source, architecture = open_with_architecture(protected)
    base_source = open_base(base, source, architecture)
    started = process_time()
    estimate = configured.estimate(source, base_source, architecture, progress=progress)
    seconds = process_time() - started
    details = {"method": method, "settings": settings_of(configured)}
    with one_thread_per_kernel():
        rewrite(
            source,
            out,
            output_like(source, edits(architecture.symmetry, [estimate.gauge])),
            manifest={"kind": "recovered", **details, "architecture": architecture.family},
            resume_token=f"recover {details} {base_source.index.headers_digest}",
            threads=threads,
            progress=progress,
        )
    return RecoverResult(
        out=out,
        method=method,
        settings=settings_of(configured),
        distance_before=estimate.before,
        distance_after=estimate.after,
        confidence=estimate.confidence,
        parts=tuple(
            {
                "block": fit.before.block,
                "part": fit.before.part,
                "before": fit.before.relative,
                "after": fit.after.relative,
                "confidence": fit.confidence,
            }
            for fit in estimate.fits
        ),
        cpu_seconds=seconds,
    )
