"""Recover: what an attacker who holds the base does to a protected checkpoint before merging it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

from unmergeable.api.inspection import inspect
from unmergeable.api.opened import architecture_of, open_base, open_with_architecture
from unmergeable.api.workers import one_thread_per_kernel
from unmergeable.architecture import Architecture
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.rewrite import OutputTensor, output_like, rewrite
from unmergeable.errors import BadInput, UsageError
from unmergeable.gauge.plan import transformed
from unmergeable.progress import Progress, silent
from unmergeable.recoveries import OF_ANY_STRUCTURE, RECOVERIES, Estimate, Inputs, Recovered
from unmergeable.settings import configure, nearest, settings_of

AUTO = "auto"


@dataclass(frozen=True)
class RecoverResult:
    """Distances are relative Frobenius norms over the weights the method fits: ‖W − W_base‖ / ‖W_base‖.

    ``confidence``: from 0 (what fitting an unrelated base gives) to 1 (the base itself). All three are None for methods
    that fit no change of basis. ``findings``: what else the method found out.
    """

    out: Path
    method: str
    settings: Mapping[str, Any]
    is_exact: bool
    findings: Mapping[str, Any]
    distance_before: float | None
    distance_after: float | None
    confidence: float | None
    parts: tuple[Mapping[str, Any], ...]
    cpu_seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "method": self.method,
            "settings": dict(self.settings),
            "exact": self.is_exact,
            "findings": dict(self.findings),
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
    sources: Sequence[Path] = (),
    settings: Mapping[str, object] | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> RecoverResult:
    """Estimate and undo a protection with nothing but the base (and public fine-tunes of it, for one method).

    Args:
        protected: the checkpoint to work on.
        base: what it was fine-tuned from.
        method: a recovery (``methods`` lists them), or ``auto`` for the one that ``inspect`` finds a sign for. Of those
            marked exact, the result computes what ``protected`` does.
        out: folder to create.
        sources: public fine-tunes of the base that may be mixed into it.
        settings: of the method.
        threads: tensors worked on at a time; None for one per processor.
        progress: told of parts estimated and bytes written.

    Raises:
        UsageError: unknown recovery or setting, sources for a method that reads none, or no sign for ``auto``.
        Mismatch: ``base`` is not the base of ``protected``'s architecture.
    """
    started = process_time()
    if method == AUTO:
        method = choose(protected, base, sources, progress)
        sources = sources if "sources" in RECOVERIES[method].needs else ()
    if method not in RECOVERIES:
        raise UsageError(f"no recovery is called {method!r}{nearest(method, {**RECOVERIES, AUTO: None})}")
    configured = configure(RECOVERIES[method], settings or {})
    if sources and "sources" not in configured.needs:
        raise UsageError(f"{method} reads no sources: leave them out.")
    inputs = _open(protected, base, sources, of_any_structure=method in OF_ANY_STRUCTURE)
    recovered = configured.recover(inputs, progress)
    seconds = process_time() - started
    estimate = recovered.estimate
    details = {"method": method, "settings": settings_of(configured)}
    read = {"protected": inputs.protected, "base": inputs.base}
    read |= {f"source {number}": source for number, source in enumerate(inputs.sources, start=1)}
    with one_thread_per_kernel():
        rewrite(
            recovered.template,
            out,
            _plan(recovered, inputs.architecture),
            manifest={"kind": "recovered", **details, "architecture": inputs.architecture.family},
            resume_token=f"recover {details} {inputs.base.index.headers_digest}",
            # Gauges are applied without reading the base again.
            also_read={role: source for role, source in read.items() if source is not recovered.template}
            if estimate is None
            else None,
            threads=threads,
            progress=progress,
        )
    return RecoverResult(
        out=out,
        method=method,
        settings=settings_of(configured),
        is_exact=configured.exact,
        findings=recovered.findings,
        distance_before=estimate.before if estimate else None,
        distance_after=estimate.after if estimate else None,
        confidence=estimate.confidence if estimate else None,
        parts=_parts(estimate) if estimate else (),
        cpu_seconds=seconds,
    )


def choose(protected: Path, base: Path, sources: Sequence[Path] = (), progress: Progress = silent) -> str:
    """The recovery for the first sign of a protection that ``inspect`` finds and one undoes.

    Raises:
        UsageError: when there is none.
        As :func:`~unmergeable.api.inspection.inspect`.
    """
    comparison = inspect(protected, base=base, sources=sources, progress=progress).comparison
    assert comparison is not None
    for sign in comparison.signs:
        if sign.recovery is not None:
            return sign.recovery
    found = f"only of {comparison.signs[0].name}, which none undoes" if comparison.signs else "of none"
    raise UsageError(
        f"auto: {protected} shows signs {found}; `inspect` lists them; name a method to try it all the same."
    )


def _plan(recovered: Recovered, architecture: Architecture) -> tuple[OutputTensor, ...]:
    if recovered.estimate is None:
        return output_like(recovered.template, recovered.edits)
    return transformed(recovered.template, architecture.symmetry, recovered.estimate.gauges)


def _open(protected: Path, base: Path, sources: Sequence[Path], *, of_any_structure: bool) -> Inputs:
    """Open everything; where ``of_any_structure``, the base alone decides the architecture."""
    tuned = tuple(open_checkpoint(source, base=base) for source in sources)
    if not of_any_structure:
        source, architecture = open_with_architecture(protected)
        return Inputs(source, open_base(base, source, architecture), architecture, tuned)
    if not base.exists():
        raise BadInput(f"base {base} does not exist; give the folder of the checkpoint this model was fine-tuned from.")
    base_source = open_checkpoint(base)
    return Inputs(open_checkpoint(protected), base_source, architecture_of(base_source), tuned)


def _parts(estimate: Estimate) -> tuple[Mapping[str, Any], ...]:
    return tuple(
        {
            "block": fit.before.block,
            "part": fit.before.part,
            "before": fit.before.relative,
            "after": fit.after.relative,
            "confidence": fit.confidence,
            "order_margin": fit.margin,
        }
        for fit in estimate.fits
    )
