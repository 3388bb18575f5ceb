"""Derive and prove the map of every ``model_type`` that the installed transformers registers for a task.

    python -m unmergeable.derivation causal-lm masked-lm --out maps/

Each type runs in a process of its own, with limits on time and memory. OUT/TASK/TYPE.json holds its map, or the reason
why it has none; what is there is not done again (``--retry`` repeats the failures). The last lines count them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import resource
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from unmergeable.derivation.build import TASKS, registered
from unmergeable.derivation.model_types import derive_map
from unmergeable.errors import UnmergeableError

CPU_SECONDS = 60
WALL_SECONDS = 300
MEMORY_BYTES = 6 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=[*TASKS, "all"])
    parser.add_argument("--out", type=Path, required=True, help="Output directory; rerun with the same one to resume.")
    parser.add_argument("--only", nargs="*", help="These model types and no others.")
    parser.add_argument("--retry", action="store_true", help="Repeat the types that have no map.")
    options = parser.parse_args()
    importlib.import_module("transformers").utils.logging.set_verbosity(50)
    warnings.simplefilter("ignore")
    for task in TASKS if "all" in options.tasks else options.tasks:
        folder = options.out / task
        folder.mkdir(parents=True, exist_ok=True)
        kinds = registered(task)
        for kind, network_class in kinds.items():
            file = folder / f"{kind}.json"
            is_wanted = not file.exists() or (options.retry and "failure" in json.loads(file.read_text()))
            if is_wanted and (options.only is None or kind in options.only):
                outcome = _apart(kind, network_class)
                file.write_text(json.dumps(outcome, indent=1) + "\n")
                print(f"{task} {kind}: {_said(outcome)}", flush=True)
        counted = [
            json.loads((folder / f"{kind}.json").read_text()) for kind in kinds if (folder / f"{kind}.json").exists()
        ]
        print(f"{task}: {sum(map(_has_both, counted))} of {len(kinds)} with a value-output and a feed-forward group")


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


def _apart(kind: str, network_class: str) -> dict[str, Any]:
    """A type's map as JSON, or its failure; derived in a process that may die."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_derive, args=(kind, network_class, sender))
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


def _derive(kind: str, network_class: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    importlib.import_module("torch").set_num_threads(1)
    start = time.process_time()
    try:
        outcome = {**derive_map(kind, network_class).to_json(), "seconds": time.process_time() - start}
    except UnmergeableError as error:
        outcome = {"failure": str(error)}
    except Exception as error:
        outcome = {"failure": f"{type(error).__name__}: {error}"[:300], "traceback": traceback.format_exc()[-1500:]}
    sender.send(outcome)


if __name__ == "__main__":
    main()
