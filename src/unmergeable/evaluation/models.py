"""The models of an audit on disk: the defended expert under each protection and control, and each of them recovered.

A model lies in a folder named after everything it was made of, with a small file of facts beside it. Both are there or
the model is made again, so an audit that was killed goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any

from unmergeable import ops
from unmergeable.checkpoint.disk import replace_file
from unmergeable.errors import BadInput, CheckpointError, UsageError
from unmergeable.evaluation.cells import digest_of, identity
from unmergeable.evaluation.control_models import KINDS_OF, SCALE_FACTOR, distance_with_key, output_gap, write_planted
from unmergeable.evaluation.methods import attack_requirements
from unmergeable.evaluation.names import GIVEN, IDENTITY, NOT_THE_EXPERT, NOTHING, SCALE
from unmergeable.evaluation.plans.audit_plan import AuditPlan
from unmergeable.evaluation.plans.entries import ExpertEntry, MethodEntry, ProtectionEntry, RecoveryEntry, TaskEntry
from unmergeable.evaluation.plans.releases import ReleaseEntry
from unmergeable.evaluation.scoring import Checkpoint
from unmergeable.evaluation.threat_models import ThreatModel
from unmergeable.ops.protection import write_control
from unmergeable.progress import Progress

CLEAR = 0.99
"""A confidence that leaves no basis to be found."""


@dataclass(frozen=True)
class Variant:
    """One thing the attacker may start from.

    Attributes:
        protection: name in the plan, or of a control.
        rider: the free-rider whose own examples the recovery read, and who alone has it; None for everybody.
        seed: of the protection's key.
        recovery: name in the plan; None where nothing was undone.
        threat_model: that of the weakest attacker who has it.
        checkpoint: the model; None where ``refusal`` says why the recovery gave none.
        has_key: whether it lies in another basis, which a key leads out of; then a recovery has something to find.
        keeps_basis: whether it is known to lie in the expert's own, so that there is nothing to find.
        cpu_seconds: what the recovery cost.
        facts: what protection and recovery reported.
    """

    protection: str
    seed: int
    recovery: str | None
    checkpoint: Checkpoint | None
    cpu_seconds: float
    facts: Mapping[str, Any]
    refusal: str = ""
    has_key: bool = False
    keeps_basis: bool = False
    threat_model: ThreatModel = ThreatModel.OFF_THE_SHELF
    rider: str | None = None

    @property
    def label(self) -> str:
        """What the released model is called beside base and experts."""
        return f"{self.protection} (seed {self.seed})"

    def is_had_by(self, rider: ExpertEntry) -> bool:
        """Whether this free-rider can have it."""
        return self.rider in (None, rider.name)


def make_variants(plan: AuditPlan, folder: Path, digests: Mapping[Path, str], progress: Progress) -> list[Variant]:
    """Protect the expert every way of the plan, and recover each result every way. Controls come first.

    Raises:
        NotEquivalent, BadInput, UsageError: from a protection; an audit of it means nothing.
        CheckpointError: the disk is full or fails.
    """
    victim = plan.victim if plan.has_expert else None
    maker = ModelMaker(plan.base, victim, plan.task(plan.defended_task), folder, digests, progress)
    released = [maker.unprotected(), maker.scaled(), maker.nothing()] if plan.has_expert else []
    if plan.has_expert and plan.reaches(ThreatModel.WHITE_BOX):  # others cannot be expected to undo anything
        released += [maker.planted(name) for name in KINDS_OF]
    released += [maker.protected(entry, seed) for entry in plan.protections for seed in plan.seeds]
    recoveries = [entry for entry in plan.recoveries if plan.reaches(entry.threat_model)]
    released += [maker.foreign(entry) for entry in plan.releases]
    given = {entry.name: maker.given(entry) for entry in plan.releases if plan.reaches(ThreatModel.WHITE_BOX)}
    made = []
    for variant in released:
        made += [variant, *given.get(variant.protection, ())]
        if variant.checkpoint is not None and variant.protection != NOTHING:
            made += _recovered(variant, recoveries, maker, plan)
    return made


def _recovered(
    released: Variant, recoveries: Sequence[RecoveryEntry], maker: ModelMaker, plan: AuditPlan
) -> list[Variant]:
    """What each recovery makes of a release, those that the attacker leaves for the end last."""
    made: list[Variant] = []
    for entry in sorted(recoveries, key=lambda entry: _is_last(entry, plan)):
        if released.protection in NOT_THE_EXPERT and not entry.threat_model.merges:
            continue  # they are controls of merging
        if _is_last(entry, plan) and _is_found(released, made):
            continue
        owners = [Owned(rider, plan.task(rider.task)) for rider in plan.riders] if entry.is_of_one_rider else [None]
        made += [maker.recovered(released, entry, own) for own in owners]
    return made


def _is_last(entry: RecoveryEntry, plan: AuditPlan) -> bool:
    return any(step.method in plan.attacker.last for step in entry.steps)


def _is_found(released: Variant, recovered: Sequence[Variant]) -> bool:
    """Whether there is no basis left to find: the base explains the result, and what was done is known.

    Of somebody's release no confidence tells whether all of it was seen. Of a planted one the verdict tells.
    """
    if released.checkpoint is not None and released.checkpoint.is_foreign:
        return False
    return any((variant.facts.get("confidence") or 0.0) >= CLEAR for variant in recovered)


@dataclass(frozen=True)
class Owned:
    """What a free-rider has of its own: a model, and examples of the task it was tuned for."""

    rider: ExpertEntry
    task: TaskEntry


@dataclass(frozen=True)
class ModelMaker:
    """Makes what is not yet in ``folder`` of one expert's models.

    Attributes:
        victim: the expert; None where nobody has it, and there are only releases to recover it from.
        task: what recoveries may learn from.
    """

    base: Path
    victim: ExpertEntry | None
    task: TaskEntry
    folder: Path
    digests: Mapping[Path, str]
    progress: Progress

    def unprotected(self) -> Variant:
        path = self._expert
        return Variant(IDENTITY, 0, None, Checkpoint(path, self.digests[path]), 0.0, {})

    def scaled(self) -> Variant:

        def make(out: Path) -> Mapping[str, Any]:
            settings = {"factor": SCALE_FACTOR}
            base, progress = self.base, self.progress
            write_control(self._expert, base=base, out=out, method=SCALE, settings=settings, progress=progress)
            return {}

        checkpoint, facts = self._made({"scale": SCALE_FACTOR, **self._origin}, make)
        return Variant(SCALE, 0, None, checkpoint, 0.0, facts)

    def nothing(self) -> Variant:
        """The base as a release: a model that truly adds nothing."""
        return Variant(NOTHING, 0, None, Checkpoint(self.base, self.digests[self.base]), 0.0, {})

    def planted(self, name: str) -> Variant:
        """The expert in an exact form that is drawn from what the audit reads: another audit draws another."""
        kinds = KINDS_OF[name]
        seed = int(identity({name: self._origin})[:8], 16)

        def make(out: Path) -> Mapping[str, Any]:
            return write_planted(self._expert, self.base, out, kinds, seed)

        recipe = {"planted": list(kinds), "seed": seed, **self._origin}
        try:
            checkpoint, facts = self._made(recipe, make)
        except CheckpointError:
            raise
        except BadInput as error:
            return Variant(name, 0, None, None, 0.0, {}, refusal=str(error))
        return Variant(name, 0, None, checkpoint, 0.0, facts)

    def protected(self, entry: ProtectionEntry, seed: int) -> Variant:
        """What the owner would release. Raises what :func:`unmergeable.ops.protect` does."""

        def make(out: Path) -> Mapping[str, Any]:
            key = out.with_name(f"{out.name}.key")
            key.unlink(missing_ok=True)
            result = ops.protect(
                self._expert,
                base=self.base,
                out=out,
                key=key,
                method=entry.method,
                settings=dict(entry.settings),
                seed=seed,
                data=entry.data,
                head=entry.head,
                encoder=entry.encoder,
                generic=entry.generic,
                siblings=entry.siblings,
                progress=self.progress,
            )
            facts = result.to_json()
            known = output_gap(self._expert, out, self.base, float(facts.get("condition_bound") or 1.0))
            if entry.is_exact:
                known["distance_with_key"] = distance_with_key(out, key, self._expert, self.base)
            return {**facts, **known}

        recipe = {
            "protect": entry.method,
            "settings": dict(entry.settings),
            "reads": [self.digests[path] for path in entry.paths],
            "seed": seed,
            **self._origin,
        }
        checkpoint, facts = self._made(recipe, make)
        return Variant(
            entry.name, seed, None, checkpoint, 0.0, facts, has_key=entry.is_exact, keeps_basis=entry.keeps_basis
        )

    def foreign(self, entry: ReleaseEntry) -> Variant:
        """What somebody else released, as it is."""
        path, trusts = entry.checkpoint, entry.trust_remote_code
        facts = {} if self.victim is None else output_gap(self._expert, path, self.base)
        return Variant(entry.name, 0, None, Checkpoint(path, self.digests[path], True, trusts), 0.0, facts)

    def given(self, entry: ReleaseEntry) -> list[Variant]:
        """The weights that somebody got out of it, where the plan has them."""
        if entry.recovered is None:
            return []
        checkpoint = Checkpoint(entry.recovered, self.digests[entry.recovered])
        return [Variant(entry.name, 0, GIVEN, checkpoint, 0.0, {}, threat_model=ThreatModel.WHITE_BOX)]

    def recovered(self, variant: Variant, entry: RecoveryEntry, own: Owned | None = None) -> Variant:
        """A recovery that refuses a model (its structure, for one) is no failure of the audit.

        Args:
            variant: what was released.
            entry: what is done to it.
            own: of the free-rider who does it, where that matters.
        """
        assert variant.checkpoint is not None
        recovered = replace(
            variant,
            recovery=entry.name,
            threat_model=entry.threat_model,
            facts={},
            rider=None if own is None else own.rider.name,
        )
        made, seconds = variant.checkpoint, 0.0
        facts: Mapping[str, Any] = {}
        try:
            for step in entry.steps:
                made, facts = self._recovered(made, step, entry.sources, own)
                seconds += float(facts["cpu_seconds"])
        except CheckpointError:
            raise
        except (BadInput, UsageError) as error:
            return replace(recovered, checkpoint=None, refusal=str(error))
        return replace(recovered, checkpoint=made, cpu_seconds=seconds, facts=facts)

    def _recovered(
        self, start: Checkpoint, step: MethodEntry, sources: Sequence[Path], own: Owned | None
    ) -> tuple[Checkpoint, Any]:
        requirements = attack_requirements(step.method, step.settings)
        task = own.task if own is not None and requirements.examples == "own" else self.task
        examples: dict[str, Any] = {}
        if "data" in requirements.needs:
            examples = {"data": task.train, "encoder": task.encoder, "fields": task.kind.fields}
        read: tuple[Path, ...] = ()
        if "sources" in requirements.needs:
            read = tuple(sources) or (() if own is None else (own.rider.path,))

        def make(out: Path) -> Mapping[str, Any]:
            result = ops.recover(
                start.path,
                base=self.base,
                method=step.method,
                settings=dict(step.settings),
                sources=read,
                out=out,
                progress=self.progress,
                **examples,
            )
            return result.to_json()

        recipe = {
            "recover": step.method,
            "settings": dict(step.settings),
            "reads": [self.digests[path] for path in (*read, *(task.paths if examples else ()))],
            "from": start.digest,
            "base": self.digests[self.base],
        }
        return self._made(recipe, make)

    @property
    def _expert(self) -> Path:
        assert self.victim is not None
        return self.victim.path

    @property
    def _origin(self) -> Mapping[str, Any]:
        return {"base": self.digests[self.base], "expert": self.digests[self._expert]}

    def _made(self, recipe: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]) -> tuple[Checkpoint, Any]:
        out = self.folder / identity(recipe)
        facts_file = out.with_suffix(".json")
        if not (out.is_dir() and facts_file.is_file()):
            shutil.rmtree(out, ignore_errors=True)
            facts_file.unlink(missing_ok=True)
            began = process_time()
            facts = {"cpu_seconds": None, **make(out)}
            if facts["cpu_seconds"] is None:
                facts["cpu_seconds"] = process_time() - began
            replace_file(facts_file, json.dumps({**facts, "digest": digest_of(out)}, default=str).encode())
        stored = json.loads(facts_file.read_text())
        return Checkpoint(out, stored["digest"]), stored
