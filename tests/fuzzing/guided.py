"""The same readers under a fuzzer guided by coverage (atheris, on libFuzzer), which keeps what reaches new code.

    pip install atheris==3.0.0
    python -m fuzzing.guided FOLDER [--target NAME …] [--runs N] [--seed N] [--json FILE]

Half of the changes are those of :mod:`fuzzing.mutators`, the others libFuzzer's own, each of something kept before. One
process a format. What is right is as in :mod:`fuzzing.run`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

WRITTEN_EVERY = 100
"""Runs between two writings of the counts; libFuzzer ends the process without coming back."""


def guided(name: str, folder: Path, runs: int, seed: int) -> None:
    """Fuzz one format in this process, which ends with it; counts are in ``counts.json`` of the folder."""
    import atheris

    # What is imported here is followed branch by branch; the rest is not.
    with atheris.instrument_imports(include=["unmergeable"]):
        import unmergeable.architecture.derived
        import unmergeable.checkpoint.open
        import unmergeable.cli.recipe
        import unmergeable.evaluation
        import unmergeable.evaluation.plans.audit_plan
        import unmergeable.evaluation.plans.table_plan
        import unmergeable.merges.mergekit.meaning
        import unmergeable.network.load
        import unmergeable.network.logits
        import unmergeable.ops
        import unmergeable.tasks  # noqa: F401
    from fuzzing.run import outcome
    from fuzzing.targets import TARGETS, prepare

    prepare(folder)
    target = TARGETS[name]
    file = folder / target.file
    valid = file.read_bytes()
    assert outcome(target, folder) == "read", f"{name}: the valid file is not read"
    counts, examples = Counter[str](), dict[str, str]()

    def write() -> None:
        wrong = {what: {"cases": counts[what], "first": examples[what]} for what in examples}
        found = {"cases": counts.total(), "read": counts["read"], "refused": counts["refused"], "wrong": wrong}
        (folder / "counts.json").write_text(json.dumps(found))

    def one(data: bytes) -> None:
        file.write_bytes(data)
        found = outcome(target, folder)
        counts[found] += 1
        is_new = found not in ("read", "refused") and found not in examples
        if is_new:
            examples[found] = data.hex()[:2000]
        if is_new or counts.total() % WRITTEN_EVERY == 0 or counts.total() >= runs:
            write()

    def change(data: bytes, most: int, drawn: int) -> bytes:
        random = Random(drawn)
        if random.random() < 0.5:
            try:
                return target.mutate(data or valid, random)[:most]
            except Exception:  # what was kept may be no document, which these changes start from
                return target.mutate(valid, random)[:most]
        return bytes(atheris.Mutate(data, most))

    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(valid)
    longest = 4 * len(valid) + 4096
    options = [f"-runs={runs}", f"-seed={seed + 1}", f"-max_len={longest}", "-timeout=60", "-rss_limit_mb=6000"]
    atheris.Setup([sys.argv[0], *options, "-verbosity=0", str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()


def report(given: argparse.Namespace) -> dict[str, Any]:
    """Counts by format, each from a process of its own."""
    from fuzzing.targets import TARGETS

    found: dict[str, Any] = {}
    for number, name in enumerate(given.target or TARGETS):
        folder = given.folder / f"{number}"
        folder.mkdir(parents=True)
        options = ["--inside", name, "--runs", str(given.runs), "--seed", str(given.seed)]
        log = (given.folder / f"{number}.log").open("w")
        with log:
            command = [sys.executable, "-m", "fuzzing.guided", str(folder), *options]
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        counts = folder / "counts.json"
        found[name] = json.loads(counts.read_text()) if counts.exists() else {"cases": 0, "wrong": {}}
        found[name]["corpus"] = sum(1 for _ in (folder / "corpus").glob("*")) if (folder / "corpus").exists() else 0
        if code != 0 or not found[name]["cases"]:
            found[name]["wrong"][f"the process ended with {code}: see {log.name}"] = {"cases": 1}
        print(name, json.dumps(found[name], indent=1), file=sys.stderr, flush=True)
        if given.json:  # each time: this takes long
            given.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", action="append")
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    if arguments.inside:
        guided(arguments.inside, arguments.folder, arguments.runs, arguments.seed)
    else:
        sys.exit(any(entry["wrong"] for entry in report(arguments).values()))
