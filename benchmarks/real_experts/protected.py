"""The owner's expert under every protection, each made in a process of its own, so that its cost is its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import Any

from benchmarks.real_experts.experts import Study
from torch import Tensor

from unmergeable.attacks.distance import parts
from unmergeable.checkpoint.disk import replace_file
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import BadInput
from unmergeable.evaluation.cells import identity
from unmergeable.ops.opened import open_with_architecture
from unmergeable.polynomials.layout import SECTION, Section

UNPROTECTED = "unprotected"
SEED = 0
"""Of keys and of what is drawn. These models are no releases: anybody can draw the same."""


@dataclass(frozen=True)
class Protection:
    """A row of the tables.

    Attributes:
        name: of the row.
        method: as ``protect`` calls it, or a control; None for the expert as it is.
        settings: those that are not the default.
        reads: what of the owner's it is given: "data" (training examples), "head".
        siblings: how many of the study's siblings it mixes in or looks at.
    """

    name: str
    method: str | None
    settings: Mapping[str, object] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    siblings: int = 0

    @property
    def is_control(self) -> bool:
        return self.method in ("noise", "scale")


def _shield(name: str, parts: str, siblings: int, **settings: object) -> Protection:
    """With the published lambdas, one for each sibling."""
    values = {"parts": parts, "coefficients": ",".join(("0.3", "0.05")[:siblings]), **settings}
    reads = () if parts == "global" or settings else ("data",)
    return Protection(f"sensitivity_shield, {name}", "sensitivity_shield", values, reads, siblings)


def _mergeguard(name: str, stages: str) -> Protection:
    """200 steps instead of 500: experts here were trained for 60 to 125."""
    settings: dict[str, object] = {"stages": stages, "examples": 500}
    if stages != "masking":
        settings["steps"] = 200
    return Protection(name, "mergeguard", settings, ("data", "head"))


_OWN = ("data",)

PROTECTIONS = (
    Protection(UNPROTECTED, None),
    Protection("mergelock", "mergelock"),
    Protection("mergelock, condition 1000", "mergelock", {"condition": 1000.0}),
    Protection("params", "params"),
    Protection("gauge", "gauge"),
    Protection("taylor_mlp", "taylor_mlp", reads=_OWN),
    Protection("taylor_mlp, as published", "taylor_mlp", {"as_published": True}, _OWN),
    Protection("mergebarrier, attention", "mergebarrier", {"parts": "attention"}),
    Protection("mergebarrier, ffn", "mergebarrier", {"parts": "ffn"}, _OWN),
    Protection("mergebarrier", "mergebarrier", reads=_OWN),
    _mergeguard("mergeguard, training", "training"),
    _mergeguard("mergeguard, masking", "masking"),
    _mergeguard("mergeguard", "both"),
    _shield("global", "global", 2),
    _shield("local", "local", 1),
    _shield("combined", "both", 2),
    _shield("combined, random 5 %", "both", 2, exclusion="random"),
    _shield("combined, all neurons", "both", 2, exclusion="none"),
    Protection("control: noise", "noise", {"size": 0.1}),
    Protection("control: scale", "scale", {"factor": 0.65}),
)
"""Every protection, the published ablations of three of them, and two controls that protect nothing."""


@dataclass(frozen=True)
class Release:
    """A protected expert: its folder, and what making it cost.

    ``cpu_seconds``: of the whole call, verification included. ``peak_mb``: the most memory it took beyond what
    Python and its libraries had taken before. ``facts``: what the method reported.
    """

    folder: Path
    cpu_seconds: float
    peak_mb: float
    facts: Mapping[str, Any]


def release(study: Study, protection: Protection) -> Release:
    """The owner's expert under a protection, made unless it is there.

    Raises:
        BadInput: the method refused; says why.
    """
    if protection.method is None:
        return Release(study.expert(study.owner), 0.0, 0.0, {})
    given = {"data": str(study.data(study.owner, "train")), "head": str(study.head(study.owner))}
    job: dict[str, Any] = {
        "method": protection.method,
        "settings": dict(protection.settings),
        "expert": str(study.expert(study.owner)),
        "base": str(study.base),
        "inputs": {name: given[name] for name in protection.reads},
        "siblings": [str(study.expert(task)) for task in study.siblings[: protection.siblings]],
    }
    out = study.folder / "releases" / f"{protection.method}-{identity(job)[:8]}"
    facts = out.with_suffix(".json")
    if not (out.exists() and facts.exists()):
        out.parent.mkdir(exist_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", __spec__.name, json.dumps({**job, "out": str(out)})]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode != 0:
            raise BadInput(made.stderr.strip().splitlines()[-1])
        replace_file(facts, made.stdout.encode())
    found = json.loads(facts.read_text())
    return Release(out, found["cpu_seconds"], found["peak_mb"], found["facts"])


def with_base_feed_forwards(study: Study, released: Path) -> dict[str, Tensor]:
    """The weights of a release whose feed-forwards are polynomials, with the base's in their place.

    What a merger gets who takes every layer that both models have. Files of some families rename tensors when their
    structure changes.
    """
    source, (base, architecture) = open_checkpoint(released), open_with_architecture(study.base)
    layout = Section.from_config(source.config, source.description).layout
    replaced = {name for part in parts(architecture) if part.name == "feed_forward" for name in part.tensors}
    return {
        name: base.tensor(name) if name in replaced else source.tensor(layout.to_module_name(name))
        for name in base.names
    }


def is_polynomial(released: Path) -> bool:
    """Whether a checkpoint has feed-forwards of polynomials."""
    return SECTION in json.loads((released / "config.json").read_text())


def make(job: Mapping[str, Any]) -> dict[str, Any]:
    """Protect in this process, whose peak of memory it is."""
    import torch

    from unmergeable import ops  # noqa: F401  imported before memory is read

    torch.set_num_threads(1)
    before, began = memory_mb("VmRSS"), process_time()
    facts = _protect(job)
    return {"cpu_seconds": process_time() - began, "peak_mb": memory_mb("VmHWM") - before, "facts": facts}


def _protect(job: Mapping[str, Any]) -> Mapping[str, Any]:
    from unmergeable import ops
    from unmergeable.ops.controls import write_control
    from unmergeable.protections import CONTROLS

    expert, method = Path(job["expert"]), job["method"]
    inputs: dict[str, Any] = {name: Path(path) for name, path in job["inputs"].items()}
    inputs |= {"base": Path(job["base"]), "out": Path(job["out"]), "settings": job["settings"]}
    if method in CONTROLS:
        write_control(expert, method=method, seed=SEED, **inputs)
        return {}
    siblings = [Path(path) for path in job["siblings"]]
    return ops.protect(expert, method=method, seed=SEED, siblings=siblings, **inputs).to_json()


def memory_mb(field: str) -> float:
    """A figure of Linux about this process: VmRSS is what it has in memory, VmHWM the most that it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    print(json.dumps(make(json.loads(sys.argv[1])), default=str))
