"""The models of an audit on disk: the defended expert under each protection and control, and each of them recovered.

A model lies in a folder named after everything it was made of, with a small file of facts beside it. Both are there or
the model is made again, so an audit that was killed goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

from unmergeable import api
from unmergeable.api.controls import write_control
from unmergeable.auditing.cells import digest_of, identity
from unmergeable.auditing.plan import MethodEntry, Plan
from unmergeable.auditing.scoring import Checkpoint
from unmergeable.checkpoint.disk import write_file
from unmergeable.errors import BadInput, CheckpointError, UsageError
from unmergeable.progress import Progress

IDENTITY, SCALE = "identity", "scale"
"""The controls: the expert itself, and base + 0.65 (expert - base). Neither protects: an audit must find that out."""

SCALE_FACTOR = 0.65


@dataclass(frozen=True)
class Variant:
    """One thing the attacker may start from.

    Attributes:
        protection: name in the plan, or of a control.
        seed: of the protection's key.
        recovery: name in the plan; None where nothing was undone.
        checkpoint: the model; None where ``refusal`` says why the recovery gave none.
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

    @property
    def label(self) -> str:
        """What the released model is called beside base and experts."""
        return f"{self.protection} (seed {self.seed})"


def make_variants(plan: Plan, folder: Path, digests: Mapping[Path, str], progress: Progress) -> list[Variant]:
    """Protect the expert every way of the plan, and recover each result every way. Controls come first.

    Raises:
        NotEquivalent, BadInput, UsageError: from a protection; an audit of it means nothing.
        CheckpointError: the disk is full or fails.
    """
    maker = _Maker(plan, folder, digests, progress)
    released = [maker.unprotected(), maker.scaled()]
    released += [maker.protected(entry, seed) for entry in plan.protections for seed in plan.seeds]
    found = []
    for variant in released:
        found.append(variant)
        if "T1" in plan.tiers:
            found += [maker.recovered(variant, recovery) for recovery in plan.recoveries]
    return found


@dataclass(frozen=True)
class _Maker:
    plan: Plan
    folder: Path
    digests: Mapping[Path, str]
    progress: Progress

    def unprotected(self) -> Variant:
        path = self.plan.victim.path
        return Variant(IDENTITY, 0, None, Checkpoint(path, self.digests[path]), 0.0, {})

    def scaled(self) -> Variant:
        def make(out: Path) -> Mapping[str, Any]:
            settings = {"factor": SCALE_FACTOR}
            base, progress = self.plan.base, self.progress
            write_control(self.plan.victim.path, base=base, out=out, method=SCALE, settings=settings, progress=progress)
            return {}

        checkpoint, facts = self._made({"scale": SCALE_FACTOR, **self._origin}, make)
        return Variant(SCALE, 0, None, checkpoint, 0.0, facts)

    def protected(self, entry: MethodEntry, seed: int) -> Variant:
        def make(out: Path) -> Mapping[str, Any]:
            key = out.with_name(f"{out.name}.key")
            key.unlink(missing_ok=True)
            result = api.protect(
                self.plan.victim.path,
                base=self.plan.base,
                out=out,
                key=key,
                method=entry.method,
                settings=dict(entry.settings),
                seed=seed,
                progress=self.progress,
            )
            return result.to_json()

        recipe = {"protect": entry.method, "settings": dict(entry.settings), "seed": seed, **self._origin}
        checkpoint, facts = self._made(recipe, make)
        return Variant(entry.name, seed, None, checkpoint, 0.0, facts)

    def recovered(self, variant: Variant, entry: MethodEntry) -> Variant:
        """A recovery that refuses a model (its structure, for one) is no failure of the audit."""
        assert variant.checkpoint is not None
        start = variant.checkpoint

        def make(out: Path) -> Mapping[str, Any]:
            result = api.recover(
                start.path,
                base=self.plan.base,
                method=entry.method,
                settings=dict(entry.settings),
                out=out,
                progress=self.progress,
            )
            return result.to_json()

        recipe = {"recover": entry.method, "settings": dict(entry.settings), "from": start.digest, **self._origin}
        try:
            checkpoint, facts = self._made(recipe, make)
        except CheckpointError:
            raise
        except (BadInput, UsageError) as error:
            return Variant(variant.protection, variant.seed, entry.name, None, 0.0, {}, str(error))
        seconds = float(facts["cpu_seconds"])
        return Variant(variant.protection, variant.seed, entry.name, checkpoint, seconds, facts)

    @property
    def _origin(self) -> Mapping[str, Any]:
        return {"base": self.digests[self.plan.base], "expert": self.digests[self.plan.victim.path]}

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
            write_file(facts_file, json.dumps({**facts, "digest": digest_of(out)}, default=str).encode())
        stored = json.loads(facts_file.read_text())
        return Checkpoint(out, stored["digest"]), stored
