"""The commands that do one attack again by hand, from the plan of an audit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from unmergeable.evaluation.attackers import DEFAULT, attacker_named
from unmergeable.evaluation.by_part import BY_PART, PARTS
from unmergeable.evaluation.methods import attack_reads, attack_requirements, has_key
from unmergeable.evaluation.names import GIVEN
from unmergeable.evaluation.plans.entries import joined
from unmergeable.evaluation.report.verdict import short
from unmergeable.evaluation.results import Trial

RELEASE, RECOVERED, MERGED = "release", "recovered", "merged"


def attack_commands(plan: Mapping[str, Any], protection: str, trial: Trial) -> list[str]:
    """Protect, recover and merge as the best attack of a trial did; paths are those of the plan.

    Args:
        plan: the document of the plan.
        protection: its name in the plan; what is none of the plan's (a control) is taken for the expert itself.
        trial: from the result of the audit.
    """
    paths = {expert["name"]: expert["path"] for expert in plan["experts"]}
    best, against = trial.best["protected"], ["--base", plan["base"]]
    commands, experts = [], [paths[trial.rider]]
    if best.uses_victim:
        protect = _find(plan["protect"]["methods"], protection)
        if protect is not None and "checkpoint" in protect:
            victim = protect["recovered" if best.recovery == GIVEN else "checkpoint"]
        else:
            victim = paths[plan["protect"]["expert"]]
        if protect is not None and "method" in protect:
            key = ["--key", "release.key"] if has_key(protect["method"], protect.get("settings") or {}) else []
            seed = ["--seed", str(trial.seed)]
            commands.append(["protect", victim, *against, *_method(protect), *seed, *key, "--out", RELEASE])
            victim = RELEASE
        recovery = _find(_listed(plan, "recoveries"), best.recovery)
        steps = [] if recovery is None else _steps(recovery)
        for number, step in enumerate(steps, start=1):
            out = RECOVERED if number == len(steps) else f"{RECOVERED}-{number}"
            given = _with_data(step, plan, trial.rider)
            commands.append(["recover", victim, *against, *_method(given), "--out", out])
            victim = out
        experts.insert(0, victim)
    merge = _find([*_listed(plan, "merges"), "task_arithmetic"], best.merge)
    if merge is not None:
        models = [text for weighted in _weighted(experts, best.coefficients) for text in ("--expert", weighted)]
        commands.append(["merge", *against, *models, *_method(merge), "--out", MERGED])
    lines = [shlex.join(["unmergeable", *command]) for command in commands]
    if best.merge == BY_PART and best.coefficients is not None:
        *own, rider = (f"{value:g}" for value in best.coefficients)
        parts = ", ".join(f"{value} of {part}" for value, part in zip(own, PARTS, strict=True))
        lines.append(f"# then {parts} and {rider} of {trial.rider} are added to the base by the audit itself")
    if best.samples and best.learning_rate is not None:
        rate = f"at a learning rate of {short(best.learning_rate)}"
        lines.append(
            f"# then {best.samples} labelled examples, and its own task's, are learnt {rate} by the audit itself"
        )
    return lines


def _with_data(step: Mapping[str, Any], plan: Mapping[str, Any], rider: str) -> Mapping[str, Any]:
    """A recovery with the examples that it reads, and the model that it starts from where that is the free-rider's."""
    needed = attack_requirements(step["method"], step.get("settings") or {})
    protect: Mapping[str, Any] = plan["protect"]
    owner = rider if needed.examples == "own" else protect.get("expert")
    expert: Mapping[str, Any] = next((expert for expert in plan["experts"] if expert["name"] == owner), protect)
    given = dict(step)
    if "data" in needed.needs:
        tasks: Sequence[Mapping[str, Any]] = plan.get("tasks", ())
        task = next((task for task in tasks if task["name"] == expert["task"]), {})
        given |= {name: task[key] for name, key in (("data", "train"), ("encoder", "encoder")) if key in task}
    if "sources" in needed.needs and not step.get("sources") and "path" in expert:
        given["sources"] = [expert["path"]]
    return given


def _weighted(experts: Sequence[str], coefficients: Sequence[float] | None) -> list[str]:
    """Coefficients are the victim's and the free-rider's; without a victim the last counts."""
    if coefficients is None:
        return list(experts)
    return [f"{path}={value:.12g}" for path, value in zip(experts, coefficients[-len(experts) :], strict=True)]


def _listed(plan: Mapping[str, Any], key: str) -> Sequence[Any]:
    """A list of the plan, or that of the attacker it names."""
    entries: Sequence[Any] | None = plan.get(key)
    if entries is not None and not isinstance(entries, str):
        return entries
    attacker = attacker_named(entries or plan.get("attacker", DEFAULT), key)
    return attacker.merges if key == "merges" else attacker.recoveries


def _find(entries: Sequence[Any], name: str | None) -> Mapping[str, Any] | None:
    """What a plan calls by this name; a method that goes by its own name may stand there as a text."""
    for entry in entries:
        described: Mapping[str, Any] = {"method": entry} if isinstance(entry, str) else entry
        if (described.get("name") or _name_of(described)) == name:
            return described
    return None


def _name_of(entry: Mapping[str, Any]) -> str:
    """What an entry without a name is called."""
    return entry.get("method") or joined(step["method"] for step in _steps(entry))


def _steps(recovery: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The methods of a recovery, each with its settings; of what it reads, each is given what it knows."""
    if "method" in recovery:
        steps = [{**recovery, "method": name.strip()} for name in recovery["method"].split(",")]
    else:
        sources = {"sources": recovery.get("sources")}
        steps = [{**sources, **({"method": step} if isinstance(step, str) else step)} for step in recovery["steps"]]
    return [step if "sources" in _reads(step) else {**step, "sources": None} for step in steps]


def _reads(step: Mapping[str, Any]) -> frozenset[str]:
    return attack_reads(step["method"], step.get("settings") or {})


def _method(entry: Mapping[str, Any]) -> list[str]:
    """The options that name a method, its settings and what it reads."""
    options = ["--method", entry["method"]]
    for key, value in (entry.get("settings") or {}).items():
        options += ["--set", f"{key}={value}"]
    for key in ("data", "head", "encoder", "generic"):
        if entry.get(key):
            options += [f"--{key}", entry[key]]
    for option, paths in (("--sibling", entry.get("siblings")), ("--source", entry.get("sources"))):
        options += [text for path in paths or () for text in (option, path)]
    return options
