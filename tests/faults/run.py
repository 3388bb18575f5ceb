"""Run commands under faults, each in a child of this process, and say what was not as it must be.

    python -m faults.run FOLDER [--scene NAME …] [--kind KIND …] [--every N] [--json FILE]

After a fault OUT is absent or whole, the failure is one line with the contract's exit code; the same command then
succeeds, and leaves what an undisturbed run leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from faults.injection import Faults, Kind
from faults.scenes import SCENES, Scene, timeless
from unmergeable.checkpoint.manifest import check_files
from unmergeable.cli import main

SECONDS = 900
"""No run of a scene takes so long: one that does is stuck."""

ESCAPED = 99
"""Exit code where an exception leaves the command."""

ALLOWED: dict[Kind, frozenset[int]] = {
    "kill": frozenset({0}),
    "full": frozenset({0, 1}),
    "broken": frozenset({0, 1, 3, 5}),
}
"""Exit codes; 0 where what failed was not needed."""


@dataclass(frozen=True)
class Ran:
    """How a child ended: its exit code, or the signal that ended it as a negative number."""

    code: int
    counted: int
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if not line.startswith("warning: ")]


class Stage:
    """A scene in a folder, set up anew for each fault."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self._scene = scene
        self._template, self.folder, self._notes = (folder / name for name in ("template", "work", "notes"))
        for place in (self._template, self._notes):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        # In a child as well: threads that torch has begun here would be missing in every child after.
        if self._ended(lambda: scene.prepare(self._template)) != 0:
            raise RuntimeError(f"the scene cannot be prepared: {(self._notes / 'stderr').read_text()}")
        self.set_up()
        self._import_modules()
        self.set_up()
        self.undisturbed = self.run(Faults(self.folder, "broken", -1))
        self.expected = self.contents()

    def _import_modules(self) -> None:
        """What the command imports on its way, so that not every child has to."""
        names = self._notes / "modules"
        before = set(sys.modules)

        def command() -> None:
            os.environ.update(self._scene.environment)
            os.chdir(self.folder)
            main([*self._scene.arguments, "--quiet"])
            names.write_text("\n".join(set(sys.modules) - before))

        self._ended(command)
        for name in names.read_text().split():
            with contextlib.suppress(Exception):  # some are made by hand, and can only be imported by who made them
                importlib.import_module(name)

    def set_up(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._template, self.folder, copy_function=os.link)

    def run(self, faults: Faults | None = None) -> Ran:
        counted = self._notes / "counted"
        counted.unlink(missing_ok=True)

        def command() -> int:
            os.environ.update(self._scene.environment)
            os.chdir(self.folder)
            if faults is not None:
                faults.install()
            code = main([*self._scene.arguments, "--quiet"])
            if faults is not None:
                counted.write_text(str(faults.counted))
            return code

        code = self._ended(command)
        return Ran(code, int(counted.read_text()) if counted.exists() else 0, (self._notes / "stderr").read_text())

    def _ended(self, work: Callable[[], int | None]) -> int:
        """The exit code of a child that does the work; what it prints is in the notes."""
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.alarm(SECONDS)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(self._notes / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        try:
            code = work() or 0
        except BaseException:
            traceback.print_exc()
            code = ESCAPED
        sys.stderr.flush()
        os._exit(code)

    def contents(self) -> dict[str, bytes]:
        files = (path for path in sorted(self.folder.rglob("*")) if not path.is_dir())
        names = {str(path.relative_to(self.folder)): path for path in files}
        return {name: timeless(name, path.read_bytes()) for name, path in names.items()}

    def faulted(self, kind: Kind, number: int) -> Iterator[str]:
        """What is wrong after a fault, and after the run that follows."""
        self.set_up()
        ran = self.run(Faults(self.folder, kind, number))
        if kind == "kill" and ran.code == -signal.SIGKILL:
            pass
        elif ran.code == -signal.SIGALRM:
            yield "stuck"
        elif ran.code not in ALLOWED[kind] | {self.undisturbed.code}:
            yield f"exit code {ran.code}: {ran.stderr}"
        elif ran.code != self.undisturbed.code and (len(ran.errors) != 1 or "internal error" in ran.stderr):
            yield f"not one line: {ran.stderr}"
        for name in self._scene.outputs:
            if (self.folder / name).exists() and check_files(self.folder / name):
                yield f"{name} is not whole"
        found = self.contents()
        if found == self.expected and (kind == "kill" or ran.code == self.undisturbed.code):
            return  # the work is done; where data decide too, a command cannot know its own result again
        again = self.run()
        if again.code != self.undisturbed.code:
            yield f"the next run fails ({again.code}) after {ran.stderr.strip() or 'no message'}: {again.stderr}"
            return
        found = self.contents()
        differing = sorted(
            name for name in found.keys() | self.expected.keys() if found.get(name) != self.expected.get(name)
        )
        if differing:
            yield f"differs from an undisturbed run: {', '.join(differing)}"


def disturbed(stage: Stage, kind: Kind, every: int) -> tuple[int, list[str]]:
    """Every ``every``-th call of a scene struck; the number of faults and what was wrong."""
    stage.set_up()
    calls = stage.run(Faults(stage.folder, kind, -1)).counted
    wrong = [
        f"{kind} at call {number}: {words}"
        for number in range(0, calls, every)
        for words in stage.faulted(kind, number)
    ]
    return len(range(0, calls, every)), wrong


Record = dict[str, int | list[str]]
"""Of the faults of one kind in one scene: how many there were, which share of the calls, and what was wrong."""


def report(
    folder: Path, scenes: Sequence[str], kinds: Sequence[Kind], every: int, file: Path | None
) -> dict[str, dict[str, Record]]:
    """By scene and kind: how many faults, and what was wrong; in ``file`` too, beside those that it has already."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, dict[str, Record]] = {}
    for name in scenes:
        stage = Stage(SCENES[name], folder / name.replace(", ", "-").replace(" ", "-"))
        for kind in kinds:
            count, wrong = disturbed(stage, kind, every)
            record: Record = {"every": every, "faults": count, "wrong": wrong}
            found.setdefault(name, {})[kind] = record
            print(name, kind, json.dumps(record, indent=1), file=sys.stderr, flush=True)
            if file is not None:
                held = json.loads(file.read_text())["scenes"] if file.exists() else {}
                held[name] = {**held.get(name, {}), kind: record}
                file.write_text(json.dumps({"scenes": held}, indent=2) + "\n")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scene", action="append", choices=SCENES)
    parser.add_argument("--kind", action="append", choices=get_args(Kind))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    given = parse()
    kinds = given.kind or get_args(Kind)
    result = report(given.folder.resolve(), given.scene or list(SCENES), kinds, given.every, given.json)
    sys.exit(any(record["wrong"] for entry in result.values() for record in entry.values()))
