"""Kill the installed command at random moments, and run it again until it ends; then compare with an undisturbed run.

    python -m faults.kills FOLDER [--kills N] [--megabytes N] [--command PATH] [--json FILE]

Protects a Llama of random weights and restores it. After a kill, OUT is absent or whole; the same command goes on.
A FILE that is there counts: with another seed than it was made with, only what is missing of N is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from unmergeable.checkpoint.manifest import check_files


@dataclass(frozen=True)
class Work:
    """A command of the program, what it writes below its folder, and how long it takes undisturbed."""

    arguments: Sequence[str]
    folder: Path
    seconds: float
    expected: dict[str, str]


def write_model(folder: Path, megabytes: int) -> None:
    """A Llama in shards, in float32 (2.2 MB each layer at this width)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 256
    layers = max(1, int(megabytes * 1e6 / (34 * width**2)))
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20MB")


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file at any depth, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prepared(program: Sequence[str], arguments: Sequence[str], folder: Path) -> Work:
    """The work with its undisturbed result."""
    folder.mkdir()
    began = time.monotonic()
    subprocess.run([*program, *arguments], cwd=folder, check=True, capture_output=True)
    seconds, expected = time.monotonic() - began, contents(folder)
    shutil.rmtree(folder)
    return Work(arguments, folder, seconds, expected)


def disturbed(program: Sequence[str], work: Work, random: Random) -> tuple[int, list[str]]:
    """One piece of work, killed again and again and then left alone: how many kills, and what was wrong."""
    work.folder.mkdir()
    command, kills, wrong = [*program, *work.arguments], 0, list[str]()
    for _ in range(random.choice((1, 2, 3, 4))):
        process = subprocess.Popen(command, cwd=work.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            process.wait(timeout=random.uniform(0.0, 1.05) * work.seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        assert process.stderr is not None
        if process.returncode not in (0, -signal.SIGKILL):
            wrong.append(f"exit code {process.returncode}: {process.stderr.read().decode()}")
        process.stderr.close()
        if (work.folder / "out").exists() and check_files(work.folder / "out"):
            wrong.append("OUT is not whole")
    ended = subprocess.run(command, cwd=work.folder, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        wrong.append(f"the last run fails: {ended.stderr}")
    elif contents(work.folder) != work.expected:
        wrong.append(f"not what an undisturbed run leaves: {sorted(contents(work.folder))}")
    shutil.rmtree(work.folder)
    return kills, wrong


def earlier(file: Path | None, seed: int) -> dict[str, Any]:
    """What runs with other seeds have counted."""
    nothing = {"kills": {}, "pieces_of_work": 0, "wrong": [], "seeds": []}
    found = json.loads(file.read_text()) if file is not None and file.exists() else nothing
    return nothing if seed in found["seeds"] else found


def main() -> int:
    """Until there were as many kills as asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", help="the installed program; this Python's own when not given")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    folder = given.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    program = [sys.executable, "-m", "unmergeable"] if given.command is None else [str(Path(given.command).absolute())]
    model, release = folder / "model", folder / "release"
    write_model(model, given.megabytes)
    megabytes = sum(path.stat().st_size for path in model.iterdir()) / 1e6
    protect = ["protect", str(model), "--base", str(model), "--seed", "5", "--method", "gauge", "--quiet", "--out"]
    subprocess.run([*program, *protect, str(release), "--key", f"{release}.key"], check=True, capture_output=True)
    restore = ["restore", str(release), "--key", f"{release}.key", "--quiet", "--out", "out"]
    works = {
        "protect": prepared(program, [*protect, "out", "--key", "out.key"], folder / "work"),
        "restore": prepared(program, restore, folder / "work"),
    }
    before = earlier(given.json, given.seed)
    seeds, wrong, runs = [*before["seeds"], given.seed], list(before["wrong"]), before["pieces_of_work"]
    random, kills = Random(given.seed), Counter[str](before["kills"])
    while kills.total() < given.kills:
        name = random.choice(sorted(works))
        count, words = disturbed(program, works[name], random)
        kills[name] += count
        runs += 1
        wrong += [f"{name}: {word}" for word in words]
        found = {
            "megabytes": round(megabytes),
            "kills": dict(kills),
            "pieces_of_work": runs,
            "seeds": seeds,
            "wrong": wrong,
        }
        print(json.dumps(found), file=sys.stderr, flush=True)
        if given.json:  # each time: this takes hours
            given.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
