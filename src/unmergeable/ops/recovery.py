"""Recover: attack a protected checkpoint, as somebody would who holds the base, and write what comes of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

from unmergeable.attacks import ATTACKS, Attack, AttackRequirements, Estimate, Fit, Inputs, Learnt, NearestOrbit
from unmergeable.attacks.base import Finding, recovered_by
from unmergeable.attacks.examples import Examples
from unmergeable.attacks.prepared import Prepared, prepared
from unmergeable.checkpoint.hub import folder_of
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.partial import require_absent, require_absent_or_written, require_outside
from unmergeable.checkpoint.rewrite import rewrite
from unmergeable.data import Fields
from unmergeable.errors import BadInput, UsageError
from unmergeable.ops.inspection import inspect
from unmergeable.ops.opened import architecture_of, in_words_of_base, open_base
from unmergeable.polynomials.layout import SECTION
from unmergeable.progress import Progress, silent
from unmergeable.settings import configure, settings_of
from unmergeable.threads import one_thread_per_kernel

AUTO = "auto"

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class RecoverResult:
    """What an attack wrote, and what it found out.

    Attributes:
        out: the folder written.
        method: the name of the attack; the one that was chosen where ``auto`` was asked for.
        settings: of the method, defaults included.
        is_exact: the result computes what the protected checkpoint computes.
        findings: numbers the attack found in the weights, by name.
        distance_before: relative Frobenius distance of the weights the attack fits to the base's, as given:
            ||W - W_base|| / ||W_base||. None, as are the next two, for attacks that fit no change of basis.
        distance_after: the same for the result.
        confidence: from 0, what fitting an unrelated base gives, to 1, the base itself.
        parts: the fit of every part of a block; none for attacks that fit no change of basis.
        cpu_seconds: of the estimate, without writing.
        learnt: what the attack found out from data; None where it took none.
    """

    out: Path
    method: str
    settings: Mapping[str, Any]
    is_exact: bool
    findings: Mapping[str, Finding]
    distance_before: float | None
    distance_after: float | None
    confidence: float | None
    parts: tuple[Fit, ...]
    cpu_seconds: float
    learnt: Learnt | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "method": self.method,
            "settings": dict(self.settings),
            "exact": self.is_exact,
            "findings": dict(self.findings),
            "learnt": None if self.learnt is None else self.learnt.to_json(),
            "distance_before": self.distance_before,
            "distance_after": self.distance_after,
            "confidence": self.confidence,
            "cpu_seconds": self.cpu_seconds,
            "parts": [part.to_json() for part in self.parts],
        }

    def lines(self) -> list[str]:
        """The same for a terminal."""
        lines = [f"Recovered: {self.out} ({self.method}; {self.cpu_seconds:.1f} CPU seconds for the estimate)"]
        for name, value in self.findings.items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"{name.replace('_', ' ').capitalize()}: {shown}")
        lines += [] if self.learnt is None else self.learnt.lines()
        if self.distance_before is not None:
            lines += [
                f"Relative distance of the fitted weights to the base: {self.distance_before:.3g} before, "
                f"{self.distance_after:.3g} after",
                f"Confidence of the fit: {self.confidence:.2f} (0: what an unrelated base gives; 1: the base itself)",
            ]
        if self.is_exact:
            lines += ["It computes what the protected checkpoint computes, in a basis nearer to the base: merge it."]
        else:
            lines += ["It does not compute what the protected checkpoint computes: measure it, then merge it."]
        return lines


def recover(
    protected: AnyPath,
    *,
    base: AnyPath,
    method: str,
    out: AnyPath,
    sources: Sequence[AnyPath] = (),
    data: AnyPath | None = None,
    head: AnyPath | None = None,
    encoder: AnyPath | None = None,
    fields: Fields | None = None,
    settings: Mapping[str, object] | None = None,
    allow_pickle: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> RecoverResult:
    """Attack a protected checkpoint with the base and what else an attacker may hold, and write the result.

    Checkpoints are folders, or ``hub:OWNER/NAME``.

    Args:
        protected: the release, or for some attacks a merge that contains it.
        base: what it was fine-tuned from.
        method: the name of an attack (``methods`` lists them), or ``auto`` for the one that undoes the first protection
            ``inspect`` finds signs of.
        out: folder to create.
        sources: public fine-tunes of the base that may be mixed into it; for ``unmask`` and ``grad_erase`` the release;
            for ``few_shot`` the model without the victim to compare with.
        data: the attacker's examples, a local file or folder (see ``unmergeable.data``), for methods that need data.
        head: file of the task's head (``unmergeable.tasks``), where the network has none of its own.
        encoder: checkpoint whose tokenizer or image processor prepares the data; ``base`` if None.
        fields: what text, image and label are called in the data; "text", "image" and "label" if None.
        settings: of the method.
        allow_pickle: read checkpoints that have no safetensors files.
        threads: tensors worked on at a time; None for one per processor.
        progress: called with parts estimated, steps trained and bytes written.

    Raises:
        UsageError: an unknown attack or setting; sources or data that the attack does not read, or none where it needs
            them; no sign for ``auto``.
        Mismatch: ``base`` is not the base of ``protected``'s architecture.
        BadInput: the data cannot be used, or ``out`` exists.
    """
    started = process_time()
    protected, base, out = folder_of(protected), folder_of(base), Path(out)
    others = [folder_of(source) for source in sources]
    known: Estimate | None = None
    if method == AUTO:
        method, known = _chosen(protected, base, others, progress, allow_pickle=allow_pickle)
        others = others if "sources" in ATTACKS[method]().requirements().needs else []
    attack: Attack = configure(ATTACKS.require(method), settings or {})
    requirements = attack.requirements()
    _require_wanted(method, requirements, sources=others, data=data, head=head, encoder=encoder)
    require_outside(out, protected, base, *others)
    (require_absent if data is not None else require_absent_or_written)(out)
    examples = None
    if data is not None:
        prepared_by = base if encoder is None else folder_of(encoder)
        examples = Examples(Path(data), prepared_by, None if head is None else Path(head), fields or Fields())
    inputs = _open(protected, base, others, requirements, examples, allow_pickle=allow_pickle)
    first = Prepared(inputs) if requirements.access == "answers" else prepared(inputs)
    if known is not None and attack == NearestOrbit() and not first.found:
        recovered = recovered_by(known, inputs.protected)
    else:
        recovered = first.finished(attack.recover(first.inputs, progress))
    seconds = process_time() - started
    estimate = recovered.estimate
    details = {"method": method, "settings": settings_of(attack)}
    read = {"protected": inputs.protected, "base": inputs.base}
    read |= {f"source {number}": source for number, source in enumerate(inputs.sources, start=1)}
    learnt = None if recovered.learnt is None else recovered.learnt.to_json()
    run = hashlib.blake2b(json.dumps(learnt).encode(), digest_size=16).hexdigest()
    with one_thread_per_kernel():
        rewrite(
            recovered.template,
            out,
            recovered.plan(inputs.architecture),
            manifest={"kind": "recovered", **details, "architecture": inputs.architecture.family},
            resume_token=f"recover {details} {inputs.base.index.headers_digest} {run}",
            config_changes=recovered.config_changes,
            # Gauges alone are applied without reading the base again.
            also_read={role: source for role, source in read.items() if source is not recovered.template}
            if estimate is None or estimate.template is not None
            else None,
            is_determined=data is None,
            threads=threads,
            progress=progress,
        )
    return RecoverResult(
        out=out,
        method=method,
        settings=settings_of(attack),
        is_exact=requirements.exact,
        findings=recovered.findings,
        distance_before=estimate.before if estimate else None,
        distance_after=estimate.after if estimate else None,
        confidence=estimate.confidence if estimate else None,
        parts=estimate.fits if estimate else (),
        cpu_seconds=seconds,
        learnt=recovered.learnt,
    )


def _chosen(
    protected: Path, base: Path, sources: Sequence[Path], progress: Progress, *, allow_pickle: bool
) -> tuple[str, Estimate | None]:
    """The attack for the first sign of a protection that ``inspect`` finds and one undoes.

    With it comes the estimate of ``nearest_orbit`` that ``inspect`` made; None where it could not.

    Raises:
        UsageError: there is none.
        As :func:`~unmergeable.ops.inspection.inspect`.
    """
    comparison = inspect(protected, base=base, sources=sources, allow_pickle=allow_pickle, progress=progress).comparison
    assert comparison is not None
    for sign in comparison.signs:
        if sign.recovery is not None:
            return sign.recovery, comparison.estimate if sign.recovery == NearestOrbit.name else None
    seen = f"only of {comparison.signs[0].name}, which none undoes" if comparison.signs else "of none"
    raise UsageError(
        f"auto: {protected} shows signs {seen}; `inspect` lists them; name a method to try it all the same."
    )


def _require_wanted(method: str, requirements: AttackRequirements, *, sources: Sequence[Path], **data: object) -> None:
    is_given = data["data"] is not None
    if sources and "sources" not in requirements.reads:
        raise UsageError(f"{method} reads no sources: leave them out.")
    if not is_given and "data" in requirements.needs:
        raise UsageError(f"{method} learns from examples: give them with --data.")
    if is_given and "data" not in requirements.reads:
        raise UsageError(f"{method} reads no data: leave it out.")
    if not is_given and (data["head"] is not None or data["encoder"] is not None):
        raise UsageError(f"{method}: a head or an encoder is of use with data alone; leave it out.")


def _open(
    protected: Path,
    base: Path,
    sources: Sequence[Path],
    requirements: AttackRequirements,
    data: Examples | None,
    *,
    allow_pickle: bool,
) -> Inputs:
    """Open everything. Where the structure may have changed, the base alone decides the architecture."""
    tuned = tuple(open_checkpoint(source, base=base, allow_pickle=allow_pickle) for source in sources)
    # A release that is an adapter is what it makes of its base.
    release = open_checkpoint(protected, base=base, allow_pickle=allow_pickle)
    source = in_words_of_base(base, release, allow_pickle=allow_pickle)
    structure = requirements.structure
    if structure == "base" or (structure == "polynomial" and SECTION not in source.config):
        architecture = architecture_of(source)
        opened = open_base(base, source, architecture, allow_pickle=allow_pickle)
        return Inputs(source, opened, architecture, tuned, data)
    if not base.exists():
        raise BadInput(f"base {base} does not exist; give the folder of the checkpoint this model was fine-tuned from.")
    base_source = open_checkpoint(base, allow_pickle=allow_pickle)
    return Inputs(source, base_source, architecture_of(base_source), tuned, data)
