"""Recover: what an attacker who holds the base does to a protected checkpoint before merging it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any, cast

from unmergeable.architecture import Architecture
from unmergeable.attacks import (
    ATTACKS,
    MAY_READ_SOURCES,
    OF_ANY_STRUCTURE,
    Attack,
    Estimate,
    Inputs,
    NearestOrbit,
    Recovered,
    WeightAttack,
)
from unmergeable.attacks.base import recovered_by
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.partial import require_absent
from unmergeable.checkpoint.rewrite import OutputTensor, output_like, rewrite
from unmergeable.errors import BadInput, UsageError
from unmergeable.gauge.plan import transformed
from unmergeable.ops.data_recoveries import DATA_DRIVEN, AttackersData
from unmergeable.ops.inspection import inspect
from unmergeable.ops.opened import architecture_of, open_base
from unmergeable.ops.workers import one_thread_per_kernel
from unmergeable.polynomials.layout import SECTION
from unmergeable.progress import Progress, silent
from unmergeable.settings import configure, nearest, settings_of

AUTO = "auto"


@dataclass(frozen=True)
class RecoverResult:
    """Distances are relative Frobenius norms over the weights the method fits: ‖W − W_base‖ / ‖W_base‖.

    ``confidence``: from 0 (what fitting an unrelated base gives) to 1 (the base itself). All three are None for methods
    that fit no change of basis. ``findings``: what else the method found out. ``learnt``: what it found out from data,
    None where it took none.
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
    learnt: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "method": self.method,
            "settings": dict(self.settings),
            "exact": self.is_exact,
            "findings": dict(self.findings),
            "learnt": None if self.learnt is None else dict(self.learnt),
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
    data: Path | None = None,
    head: Path | None = None,
    encoder: Path | None = None,
    settings: Mapping[str, object] | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> RecoverResult:
    """Undo a protection, as far as the method can, with the base and what else an attacker may hold.

    Args:
        protected: the checkpoint to work on: the release, or for some methods a merge that contains it.
        base: what it was fine-tuned from.
        method: a recovery (``methods`` lists them), or ``auto`` for the one that ``inspect`` finds a sign for. Of those
            marked exact, the result computes what ``protected`` does.
        out: folder to create.
        sources: public fine-tunes of the base that may be mixed into it; for ``unmask`` and ``grad_erase`` the release;
            for ``few_shot`` the model without the victim to compare with.
        data: the attacker's examples, a local file or folder (see ``unmergeable.data``), for methods that need data.
        head: file of the task's head (``unmergeable.tasks``), where the network has none of its own.
        encoder: folder whose tokenizer or image processor prepares the data; ``base`` if None.
        settings: of the method.
        threads: tensors worked on at a time; None for one per processor.
        progress: told of parts estimated, steps trained and bytes written.

    Raises:
        UsageError: unknown recovery or setting, sources or data for a method that reads none, none for one that needs
            them, or no sign for ``auto``.
        Mismatch: ``base`` is not the base of ``protected``'s architecture.
        BadInput: the data cannot be used.
    """
    started = process_time()
    known: Estimate | None = None
    if method == AUTO:
        method, known = choose(protected, base, sources, progress)
        sources = sources if "sources" in ATTACKS[method].needs else ()
    if method not in ATTACKS:
        raise UsageError(f"no recovery is called {method!r}{nearest(method, {**ATTACKS, AUTO: None})}")
    configured = configure(ATTACKS[method], settings or {})
    _require_wanted(configured, sources, data, head, encoder)
    require_absent(out)
    inputs = _open(protected, base, sources, configured)
    learnt: Mapping[str, Any] | None = None
    if data is not None:
        found = DATA_DRIVEN[method](configured, inputs, AttackersData(data, encoder or base, head), progress)
        recovered, learnt = found.recovered, found.facts
    elif known is not None and configured == NearestOrbit():
        recovered = recovered_by(known, inputs.protected)
    else:
        recovered = cast(WeightAttack, configured).recover(inputs, progress)
    seconds = process_time() - started
    estimate = recovered.estimate
    details = {"method": method, "settings": settings_of(configured)}
    read = {"protected": inputs.protected, "base": inputs.base}
    read |= {f"source {number}": source for number, source in enumerate(inputs.sources, start=1)}
    run = hashlib.blake2b(json.dumps(learnt).encode(), digest_size=16).hexdigest()
    with one_thread_per_kernel():
        rewrite(
            recovered.template,
            out,
            _plan(recovered, inputs.architecture),
            manifest={"kind": "recovered", **details, "architecture": inputs.architecture.family},
            resume_token=f"recover {details} {inputs.base.index.headers_digest} {run}",
            # Gauges alone are applied without reading the base again.
            also_read={role: source for role, source in read.items() if source is not recovered.template}
            if estimate is None or estimate.template is not None
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
        learnt=learnt,
    )


def choose(
    protected: Path, base: Path, sources: Sequence[Path] = (), progress: Progress = silent
) -> tuple[str, Estimate | None]:
    """The recovery for the first sign of a protection that ``inspect`` finds and one undoes.

    With it comes the estimate of ``nearest_orbit`` that ``inspect`` made; None where it could not.

    Raises:
        UsageError: when there is none.
        As :func:`~unmergeable.ops.inspection.inspect`.
    """
    comparison = inspect(protected, base=base, sources=sources, progress=progress).comparison
    assert comparison is not None
    for sign in comparison.signs:
        if sign.recovery is not None:
            return sign.recovery, comparison.estimate if sign.recovery == NearestOrbit.name else None
    found = f"only of {comparison.signs[0].name}, which none undoes" if comparison.signs else "of none"
    raise UsageError(
        f"auto: {protected} shows signs {found}; `inspect` lists them; name a method to try it all the same."
    )


def _require_wanted(
    method: Attack, sources: Sequence[Path], data: Path | None, head: Path | None, encoder: Path | None
) -> None:
    if sources and "sources" not in method.needs and method.name not in MAY_READ_SOURCES:
        raise UsageError(f"{method.name} reads no sources: leave them out.")
    if data is None and "data" in method.needs:
        raise UsageError(f"{method.name} learns from examples: give them with --data.")
    if data is not None and "data" not in method.needs:
        raise UsageError(f"{method.name} reads no data: leave it out.")
    if data is None and (head is not None or encoder is not None):
        raise UsageError(f"{method.name}: a head or an encoder is of use with data alone; leave it out.")


def _plan(recovered: Recovered, architecture: Architecture) -> tuple[OutputTensor, ...]:
    if recovered.estimate is None:
        return output_like(recovered.template, recovered.edits)
    return transformed(recovered.template, architecture.symmetry, recovered.estimate.gauges)


def _open(protected: Path, base: Path, sources: Sequence[Path], method: Attack) -> Inputs:
    """Open everything. Where the structure may have changed, the base alone decides the architecture."""
    tuned = tuple(open_checkpoint(source, base=base) for source in sources)
    source = open_checkpoint(protected)
    is_changed = method.name in OF_ANY_STRUCTURE or (method.name in DATA_DRIVEN and SECTION in source.config)
    if not is_changed:
        architecture = architecture_of(source)
        return Inputs(source, open_base(base, source, architecture), architecture, tuned)
    if not base.exists():
        raise BadInput(f"base {base} does not exist; give the folder of the checkpoint this model was fine-tuned from.")
    base_source = open_checkpoint(base)
    return Inputs(source, base_source, architecture_of(base_source), tuned)


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
