"""A few of the calls of each command fail; `make faults` does it for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults.scenes import timeless

ROOT = Path(__file__).parents[2]

# /proc names the file behind a descriptor; macOS has another way that the harness does not know.
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")


def faulted(folder: Path, *arguments: str) -> dict[str, list[int]]:
    """How many faults of each kind, by scene, in a process of its own, which forks before it has threads."""
    result = folder / "result.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "faults.run", str(folder / "stage"), "--json", str(result), *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.exists(), ran.stderr[-2000:]
    found = json.loads(result.read_text())["scenes"]
    assert [words for entry in found.values() for record in entry.values() for words in record["wrong"]] == []
    return {scene: [record["faults"] for record in entry.values()] for scene, entry in found.items()}


def test_a_few_faults_of_protect_and_merge(tmp_path: Path) -> None:
    found = faulted(tmp_path, "--every", "61", "--scene", "protect", "--scene", "merge")
    assert all(count >= 1 for counts in found.values() for count in counts)
    assert sum(found["protect"]) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["protect, three steps", "restore", "rotate", "recover", "key", "inspect", "audit"])
def test_more_faults(scene: str, tmp_path: Path) -> None:
    faulted(tmp_path, "--every", "13", "--scene", scene)


def test_what_may_differ_and_what_may_not() -> None:
    manifest = {"files": {"a": "1"}, "measured": {"logits": {"relative_gap": 0.1}}, "signature": {"value": "x"}}
    unmeasured = {**manifest, "measured": {"logits": {"not_measured_because": "no"}}, "signature": {"value": "y"}}
    other = {**manifest, "files": {"a": "2"}}
    first, second, third = (
        timeless("out/unmergeable.json", json.dumps(m).encode()) for m in (manifest, unmeasured, other)
    )
    assert first == second != third
    assert timeless("out/unmergeable.json", b'{"files') == b'{"files'


# The control: a writer that does not care leaves something that the harness must notice.
CARELESS = """
import sys
from pathlib import Path
from faults import run
from faults.run import Stage, disturbed
from faults.scenes import Scene

def careless(arguments):
    if Path("out").exists():
        print("error: out exists", file=sys.stderr)
        return 3
    Path("out").mkdir()
    Path("out/half").write_text("half")
    Path("out/whole").write_text("whole")
    return 0

run.main = careless
stage = Stage(Scene(lambda folder: None, [], outputs=()), Path(sys.argv[1]))
print(len(disturbed(stage, "kill", 1)[1]))
"""


def test_a_careless_writer_is_noticed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    command = [sys.executable, "-c", CARELESS, str(tmp_path / "stage")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) >= 2
