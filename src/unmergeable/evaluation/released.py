"""An audit of somebody else's releases without a plan: a file of examples for each task, and the standard attacker."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmergeable.errors import UsageError
from unmergeable.evaluation.audits import Audit

PathLike = str | os.PathLike[str]

DEFENDED, RIDER = "defended", "rider"
"""What the tasks are called; of several riders each has a number."""


def audit_of_releases(
    *,
    base: PathLike,
    releases: Sequence[PathLike],
    riders: Sequence[PathLike],
    task_data: PathLike,
    rider_data: Sequence[PathLike],
    expert: PathLike | None = None,
    head: PathLike | None = None,
    rider_heads: Sequence[PathLike] = (),
    release_head: PathLike | None = None,
    recovered: PathLike | None = None,
    kind: str | None = None,
    trust_remote_code: bool = False,
    threat_models: Sequence[str] = (),
) -> Audit:
    """The audit; its ``run`` writes the plan it followed, for whoever wants more than these arguments say.

    Args:
        base: what everything was fine-tuned from.
        releases: checkpoints that somebody protected.
        riders: fine-tunes of the base that free-riders would merge with them.
        task_data: labelled examples of the defended task; split by content into what attackers learn from, select on,
            and are scored on.
        rider_data: those of each rider's task.
        expert: the release as it was before it was protected; None where nobody has it, and D* cannot be known.
        head: of the defended task, for encoders.
        rider_heads: of the riders' tasks; one for each, or none.
        release_head: of the only release, where its features are not as wide as those of the base.
        recovered: weights that somebody got out of the only release.
        kind: of all tasks; classification when None.
        trust_remote_code: whether code in the folder of the only release may be run.
        threat_models: attackers; those without data when there are none.

    Raises:
        UsageError: riders without data or heads, or with too many; or what is of one release, and there are several.
    """
    for option, given in (("--rider-data", rider_data), ("--rider-head", rider_heads)):
        if len(given) != len(riders) and (given or option == "--rider-data"):
            raise UsageError(
                f"{len(given)} {option} for {len(riders)} riders; give one for each --rider, in its order."
            )
    if len(releases) > 1 and (release_head or recovered or trust_remote_code):
        raise UsageError(
            "--release-head, --recovered and --trust-remote-code are of one release; audit them one by one, or edit "
            "the plan that an audit writes."
        )
    own = {"head": release_head, "recovered": recovered, "trust_remote_code": trust_remote_code}
    entries = [
        {"name": name, "checkpoint": path, **{key: value for key, value in own.items() if value}}
        for name, path in zip(_names(releases), releases, strict=True)
    ]
    tasks = [_task(DEFENDED, task_data, head, kind)]
    for number, data in enumerate(rider_data):
        name = RIDER if len(riders) == 1 else f"{RIDER} {number + 1}"
        tasks.append(_task(name, data, rider_heads[number] if rider_heads else None, kind))
    chosen: dict[str, Any] = {"threat_models": list(threat_models)} if threat_models else {}
    return Audit(base=base, victim=expert, attacker=riders, tasks=tasks, releases=entries, **chosen)


def _names(releases: Sequence[PathLike]) -> list[str]:
    """Releases are called after their folders, or numbered where two are called alike."""
    names = [Path(release).absolute().name for release in releases]
    return names if len(set(names)) == len(names) else [f"release {number + 1}" for number in range(len(names))]


def _task(name: str, data: PathLike, head: PathLike | None, kind: str | None) -> dict[str, Any]:
    given = {"name": name, "kind": kind, "data": data, "head": head}
    return {key: value for key, value in given.items() if value is not None}
