"""Audits: what protections are worth against an attacker who knows about them.

:mod:`unmergeable.evaluation.auditor` has the steps, :mod:`unmergeable.evaluation.run` says what lies where in the
output directory. Interrupted or killed, the same call resumes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import yaml

from unmergeable.checkpoint.disk import replace_file
from unmergeable.devices import network_device
from unmergeable.errors import BadInput
from unmergeable.evaluation.auditor import Auditor
from unmergeable.evaluation.estimate import Estimate, estimate
from unmergeable.evaluation.plans.absolute import absolute_paths
from unmergeable.evaluation.plans.audit_plan import WITHOUT_DATA, AuditPlan, parse_plan, read_plan
from unmergeable.evaluation.results import RESULT, AuditResult
from unmergeable.evaluation.run import begun, looked_at
from unmergeable.network.precision import warn_if_slower
from unmergeable.pools.pool import WorkerPool
from unmergeable.pools.ray_pool import RayPool
from unmergeable.progress import Progress, silent

PLAN = "plan.yaml"
"""The plan of an audit that was asked for without one, in its folder."""

PathLike = str | os.PathLike[str]


def audit(
    plan: PathLike,
    *,
    out: PathLike,
    root: PathLike | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: Progress = silent,
) -> AuditResult:
    """Audit protections against an attacker who knows about them.

    Interrupted or killed, the same call resumes: nothing that was computed is computed again.

    Args:
        plan: a YAML file (:mod:`unmergeable.evaluation.plans.audit_plan`).
        out: output directory; created, or that of an earlier run.
        root: where the relative paths of the plan start; its folder when None.
        workers: processes; None for one per GPU, or per processor where there are no GPUs.
        ray: address of a Ray cluster to work on, or "local"; None for processes of this machine. The result depends on
            neither.
        progress: called as models are made and attacks searched.

    Returns:
        What is written to ``out/audit.json``.

    Raises:
        BadInput, UsageError: the plan, a checkpoint or the data cannot be used; before any compute where possible.
        NotEquivalent: a protection changed the function.
        CheckpointError: the disk is full or fails; what was done is kept.
    """
    # Actors of a cluster start in folders of their own: paths are absolute.
    parsed = read_plan(Path(plan).absolute(), None if root is None else Path(root).absolute())
    return run_audit(parsed, out=Path(out), workers=workers, ray=ray, progress=progress)


def estimate_audit(
    plan: PathLike, *, root: PathLike | None = None, workers: int | None = None, progress: Progress = silent
) -> Estimate:
    """What an audit would do, once all that its plan names was looked at; nothing is written.

    Arguments and errors are those of :func:`audit`.
    """
    parsed = read_plan(Path(plan).absolute(), None if root is None else Path(root).absolute())
    return check_audit(parsed, workers=workers, progress=progress)


def check_audit(plan: AuditPlan, *, workers: int | None = None, progress: Progress = silent) -> Estimate:
    """The same for a plan that was read or built."""
    plan = plan.downloaded()
    warn_if_slower(plan.search_precision, network_device())
    with looked_at(plan, Path.cwd(), partial(WorkerPool, workers), progress):
        return estimate(plan)


def run_audit(
    plan: AuditPlan,
    *,
    out: Path,
    workers: int | None = None,
    ray: str | None = None,
    progress: Progress = silent,
    written: Mapping[str, Any] | None = None,
) -> AuditResult:
    """The same for a plan that was read or built; ``written`` is kept beside the result as a plan to edit.

    Raises what :func:`audit` does.
    """
    plan = plan.downloaded()
    warn_if_slower(plan.search_precision, network_device())
    pool = partial(WorkerPool, workers) if ray is None else partial(RayPool, ray, workers)
    with begun(plan, out, "audit", pool, progress) as run:
        if written is not None:
            replace_file(out / PLAN, yaml.safe_dump(dict(written), sort_keys=False, allow_unicode=True).encode())
        result = Auditor(run, plan).result()
        replace_file(out / RESULT, (json.dumps(result.to_json(), indent=1) + "\n").encode())
    return result


@dataclass(frozen=True, kw_only=True)
class Audit:
    """An audit from Python: the plan that a file would give, without the file.

        result = unmergeable.Audit(
            base="base",
            victim="expert-digits",
            attacker="expert-animals",
            tasks=[
                {"name": "digits", "data": "digits.npz", "head": "digits-head.safetensors"},
                {"name": "animals", "data": "animals.npz", "head": "animals-head.safetensors"},
            ],
            protections=["mergelock"],
        ).run(out="audit")

    Checkpoints are paths, relative to the working directory, or ``hub:OWNER/NAME``. For somebody else's release:

        unmergeable.Audit(base="base", releases=["their-release"], attacker="expert-animals", tasks=[...]).run("audit")

    Attributes:
        base: what everything was fine-tuned from.
        victim: the defended expert as it was before it was protected, tuned for the first of the tasks; None where
            nobody has it, and D* cannot be known.
        attacker: the free-rider's model, tuned for the second; or several, each with a task.
        tasks: each with the entries that a plan has (docs/audit.md).
        protections: names, or mappings with the entries that a plan has.
        releases: checkpoints that somebody else protected, called after their folders; or mappings with the entries
            that a plan has.
        version: of the attacker (:mod:`unmergeable.evaluation.attackers`), which says what merges and recoveries are
            tried.
        threat_models: what the attackers have; names, or codes.
        entries: further entries of the plan, ``coefficients`` or ``seeds``; ``merges`` and ``recoveries`` take the
            place of the version's.
    """

    base: PathLike
    victim: PathLike | None = None
    attacker: PathLike | Sequence[PathLike]
    tasks: Sequence[Mapping[str, Any]]
    protections: Sequence[str | Mapping[str, Any]] = ()
    releases: Sequence[PathLike | Mapping[str, Any]] = ()
    version: str = "standard"
    threat_models: Sequence[str] = tuple(model.label for model in WITHOUT_DATA)
    entries: Mapping[str, Any] = field(default_factory=dict)

    def plan(self) -> AuditPlan:
        """The plan.

        Raises:
            BadInput, UsageError: as :func:`unmergeable.evaluation.plans.audit_plan.read_plan` does.
        """
        return parse_plan(self.document(), Path.cwd(), "the audit")

    def document(self) -> dict[str, Any]:
        """The plan as YAML would give it. Raises BadInput unless there is a task for every expert."""
        attackers = [self.attacker] if isinstance(self.attacker, str | os.PathLike) else list(self.attacker)
        if len(self.tasks) != 1 + len(attackers):
            raise BadInput(f"{len(self.tasks)} tasks for {1 + len(attackers)} experts: give the victim's task first.")
        names = ["attacker"] if len(attackers) == 1 else [f"attacker {number + 1}" for number in range(len(attackers))]
        first, *others = self.tasks
        experts = [
            {"name": name, "path": path, "task": task.get("name")}
            for name, path, task in zip(names, attackers, others, strict=True)
        ]
        if self.victim is None:
            owner = {"task": first.get("name")}
        else:
            owner = {"expert": "victim"}
            experts.insert(0, {"name": "victim", "path": self.victim, "task": first.get("name")})
        document = {
            "base": self.base,
            "experts": experts,
            "protect": {**owner, "methods": [*self.protections, *map(_release, self.releases)]},
            **({} if {"merges", "recoveries"} & self.entries.keys() else {"attacker": self.version}),
            "threat_models": self.threat_models,
            "tasks": self.tasks,
            **self.entries,
        }
        plain: dict[str, Any] = _plain(document)
        return plain

    def estimate(self, *, workers: int | None = None, progress: Progress = silent) -> Estimate:
        """What :meth:`run` would do, once everything was looked at; nothing is written."""
        return check_audit(self.plan(), workers=workers, progress=progress)

    def run(
        self, out: PathLike, *, workers: int | None = None, ray: str | None = None, progress: Progress = silent
    ) -> AuditResult:
        """Run it. Arguments, result and errors are those of :func:`audit`.

        The plan, with absolute paths, is written to ``out/plan.yaml``.
        """
        written = absolute_paths(self.document(), Path.cwd())
        return run_audit(self.plan(), out=Path(out), workers=workers, ray=ray, progress=progress, written=written)


def _release(release: PathLike | Mapping[str, Any]) -> Mapping[str, Any]:
    """A release as an entry of the plan."""
    if isinstance(release, Mapping):
        return release
    return {"name": PurePath(release).name.rpartition(":")[2], "checkpoint": release}


def _plain(value: Any) -> Any:
    """As YAML would give it: texts for paths, lists for tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
