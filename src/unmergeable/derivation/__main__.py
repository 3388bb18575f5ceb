"""Derive and prove the map of every ``model_type`` that the installed transformers registers for a task.

    python -m unmergeable.derivation causal-lm masked-lm --out maps/
    python -m unmergeable.derivation --count
    python -m unmergeable.derivation --ship --out maps/
    python -m unmergeable.derivation --confirm

Each type runs in a process of its own, with limits on time and memory. OUT/TASK/TYPE.json holds its map, or the reason
why it has none; what is there is not done again (``--retry`` repeats the failures). The last lines count them.
``--count`` derives nothing, and counts the maps of the package. ``--ship`` puts the maps in OUT into the package, in a
source tree, and writes the list of what is not supported and the page docs/model-types.md. ``--confirm`` reads every
map of the package back for a network of sizes it was not made from, and proves it there; it exits 1 if one fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from unmergeable.architecture.derived import DerivedMap, forget_shipped, known_map, shipped
from unmergeable.architecture.families import FAMILIES
from unmergeable.derivation.build import TASKS, VARIANTS, class_named, registered, varied
from unmergeable.derivation.model_types import built, confirm, derive_map, usual_config
from unmergeable.derivation.shrink import UNSEEN
from unmergeable.derivation.summary import counts, levels, page, read_reasons, short
from unmergeable.errors import UnmergeableError

CPU_SECONDS = 300
WALL_SECONDS = 3600
MEMORY_BYTES = 6 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"{', '.join(TASKS)}, or all.")
    parser.add_argument("--out", type=Path, help="Output directory; rerun with the same one to resume.")
    parser.add_argument("--only", nargs="*", help="These model types and no others.")
    parser.add_argument("--retry", action="store_true", help="Repeat the types that have no map.")
    parser.add_argument("--count", action="store_true", help="Count the maps of the package, and derive none.")
    parser.add_argument("--ship", action="store_true", help="Put the maps in the output directory into the package.")
    parser.add_argument("--confirm", action="store_true", help="Prove the maps of the package at sizes of their own.")
    options = parser.parse_args()
    if unknown := set(options.tasks) - {*TASKS, "all"}:
        parser.error(f"unknown task {min(unknown)}; there are {', '.join(TASKS)}, and all")
    if options.out is None and not (options.count or options.confirm):
        parser.error("give --out DIR, --count or --confirm")
    if options.ship:
        ship(options.out)
    if options.count or options.ship:
        for task in TASKS:
            print(f"{task}: " + ", ".join(f"{number} {name}" for name, number in counts(task).items()))
        return
    importlib.import_module("transformers").utils.logging.set_verbosity(50)
    if options.confirm:
        sys.exit(confirm_shipped(options.only))
    importlib.import_module("transformers.models.llama.modeling_llama")  # once, and not in every process
    warnings.simplefilter("ignore")
    for task in TASKS if "all" in options.tasks else options.tasks:
        folder = options.out / task
        folder.mkdir(parents=True, exist_ok=True)
        kinds = registered(task)
        for kind, network_class in kinds.items():
            file = folder / f"{kind}.json"
            is_wanted = not file.exists() or (options.retry and "failure" in json.loads(file.read_text()))
            if is_wanted and (options.only is None or kind in options.only):
                outcome = _apart(_derive, kind, network_class)
                file.write_text(json.dumps(outcome, indent=1) + "\n")
                print(f"{task} {kind}: {_said(outcome)}", flush=True)
        counted = [
            json.loads((folder / f"{kind}.json").read_text()) for kind in kinds if (folder / f"{kind}.json").exists()
        ]
        print(f"{task}: {sum(map(_has_both, counted))} of {len(kinds)} with a value-output and a feed-forward group")


def confirm_shipped(only: Sequence[str] | None) -> int:
    """Prove every map of the package, or ``only`` some, at sizes it was not made from; the exit status."""
    warnings.simplefilter("ignore")
    failed = 0
    kinds = sorted(kind for kind in shipped() if only is None or kind in only)
    for kind in kinds:
        derived = known_map(kind)
        assert derived is not None
        outcome = _apart(_confirm, derived)
        failed += "failure" in outcome
        print(f"{kind}: {outcome.get('failure', 'confirmed')}", flush=True)
    print(f"{len(kinds) - failed} of {len(kinds)} maps are confirmed")
    return int(failed > 0)


def ship(out: Path) -> None:
    """Put the maps in ``out`` into the package, with the reasons for what has none."""
    package = Path(str(files("unmergeable")))
    outcomes = {
        task: {file.stem: json.loads(file.read_text("utf-8")) for file in sorted((out / task).glob("*.json"))}
        for task in TASKS
    }
    best = widest(outcomes)
    for kind, outcome in best.items():
        (package / "architecture" / "maps" / f"{kind}.json").write_text(json.dumps(outcome, indent=1) + "\n", "utf-8")
    forget_shipped()
    before, reasons = read_reasons(), dict[str, dict[str, str]]()
    for task in TASKS:
        for kind, known in levels(task).items():
            if known == "none":
                tried = outcomes[task].get(kind)
                told = before.get(task, {}).get(kind, "not tried")
                reasons.setdefault(task, {})[kind] = short(tried) if tried else told
            elif known == "part":
                reasons.setdefault(task, {})[kind] = short(best.get(kind) or _known(kind))
    (package / "derivation" / "unsupported.json").write_text(json.dumps(reasons, indent=1) + "\n", "utf-8")
    (package.parents[1] / "docs" / "model-types.md").write_text(page(reasons), "utf-8")


def widest(outcomes: Mapping[str, Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The map of every type among ``outcomes`` by task and type, where it is to replace that of the package.

    Of a type that has several tasks, the map with the most attentions is kept, of equals that for the later task. The
    decoder of an encoder-decoder is registered as a type's language model, too: a map of it alone replaces none of
    the whole.
    """
    best: dict[str, dict[str, Any]] = {}
    for own in outcomes.values():
        for kind, outcome in own.items():
            if kind in FAMILIES or "failure" in outcome:
                continue
            before = best.get(kind) or (_known(kind) if kind in shipped() else None)
            if before is None or len(outcome["attentions"]) >= len(before["attentions"]):
                best[kind] = {name: value for name, value in outcome.items() if name != "seconds"}
    return best


def _known(kind: str) -> dict[str, Any]:
    derived = known_map(kind)
    assert derived is not None
    return derived.to_json()


def _has_both(outcome: dict[str, Any]) -> bool:
    return bool(outcome.get("attentions")) and bool(outcome.get("feed_forwards"))


def _said(outcome: dict[str, Any]) -> str:
    if "failure" in outcome:
        return str(outcome["failure"])
    scored = sum(bool(template["parts"]) for template in outcome["attentions"])
    text = (
        f"{len(outcome['attentions'])} attentions ({scored} with scores), {len(outcome['feed_forwards'])} feed-forwards"
    )
    return f"{text}, {outcome['seconds']:.0f} s"


def _apart(work: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """What ``work`` returns, or its failure, from a process that may die."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_bounded, args=(sender, work, arguments))
    process.start()
    sender.close()
    outcome: dict[str, Any] = {
        "failure": f"took more than {CPU_SECONDS} s of processor time, or {MEMORY_BYTES >> 30} GB"
    }
    try:
        if receiver.poll(WALL_SECONDS):
            outcome = receiver.recv()
    except EOFError:
        outcome |= {"exit": process.exitcode}
    process.kill()
    process.join()
    return outcome


def _bounded(sender: Any, work: Callable[..., dict[str, Any]], arguments: Sequence[object]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    importlib.import_module("torch").set_num_threads(1)
    try:
        outcome = work(*arguments)
    except UnmergeableError as error:
        outcome = {"failure": str(error)}
    except Exception as error:
        outcome = {"failure": f"{type(error).__name__}: {error}"[:300], "traceback": traceback.format_exc()[-1500:]}
    sender.send(outcome)


def _derive(kind: str, network_class: str) -> dict[str, Any]:
    start = time.process_time()
    return {**derive_map(kind, network_class).to_json(), "seconds": time.process_time() - start}


def _confirm(derived: DerivedMap) -> dict[str, Any]:
    for name in (derived.network_class, *derived.proof.get("also", ())):
        network = class_named(name)
        usual = usual_config(derived.model_type, network)
        for settings in ({}, *VARIANTS.get(derived.model_type, ())):
            confirm(derived, built(varied(usual, settings), network, UNSEEN))
    return {}


if __name__ == "__main__":
    main()
