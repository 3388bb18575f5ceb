"""Build the wheel twice, compare the two, install one in an environment of its own, and use it there.

    python tests/wheel.py FOLDER [--with-dependencies]

The environment has nothing but the wheel; torch and the rest are lent by the Python that runs this, but for
``--with-dependencies``, which installs them from the package index as a user would.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUST_HOLD = ("unmergeable/py.typed", "unmergeable/claims.json", "unmergeable/page/base.html.j2")
STORY = """
import socket, sys, tempfile, warnings
warnings.simplefilter("error")

def refuse(*arguments):
    raise OSError("no network here")

socket.socket.connect = refuse
from pathlib import Path
import unmergeable
assert "site-packages" in unmergeable.__file__, unmergeable.__file__
from unmergeable.cli import main
folder = Path(tempfile.mkdtemp())
warnings.simplefilter("default")  # what other packages say at import is theirs
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=40)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "model")
warnings.simplefilter("error")
model, out = str(folder / "model"), str(folder / "out")
for command in (
    ["protect", model, "--base", model, "--out", out, "--key", out + ".key"],
    ["verify", out, "--manifest"],
    ["restore", out, "--key", out + ".key", "--out", str(folder / "restored")],
    ["verify", model, str(folder / "restored")],
    ["schema"],
):
    code = main([*command, "--quiet"])
    if code:
        sys.exit(f"{command[0]}: {code}")
"""


def build(folder: Path) -> Path:
    """The wheel, from a copy of what git tracks: what else lies about does not get in."""
    source = folder / "source"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, names):
        if name.startswith("src/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    time = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, check=True, capture_output=True, text=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": time.stdout.strip()})
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path, *, with_dependencies: bool) -> tuple[Path, dict[str, str]]:
    """The Python of a new environment that holds the wheel, and the variables to run it with."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    what = [f"{wheel}[hf]"] if with_dependencies else ["--no-deps", str(wheel)]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *what], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if not with_dependencies:
        environment["PYTHONPATH"] = sysconfig.get_paths()["purelib"]
    return python, environment


def main() -> None:
    """Exits with a message where something is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--with-dependencies", action="store_true")
    given = parser.parse_args()
    folder = given.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    wheels = []
    for name in ("first", "second"):
        (folder / name).mkdir(parents=True)
        wheels.append(build(folder / name))
    hashes = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
    if hashes[0] != hashes[1]:
        sys.exit(f"two builds differ: {hashes}")
    held = zipfile.ZipFile(wheels[0]).namelist()
    if missing := [name for name in MUST_HOLD if name not in held]:
        sys.exit(f"the wheel lacks {missing}")
    if foreign := [name for name in held if name.split("/")[0].split("-")[0] != "unmergeable"]:
        sys.exit(f"the wheel holds {foreign}")
    python, environment = install(wheels[0], folder / "environment", with_dependencies=given.with_dependencies)
    environment["HF_HUB_OFFLINE"] = "1"
    for command in ([str(python.with_name("unmergeable")), "--version"], [str(python), "-c", STORY]):
        subprocess.run(command, check=True, env=environment, cwd=folder)
    print(f"{wheels[0].name}: sha256 {hashes[0]}, built twice, installed and used")


if __name__ == "__main__":
    main()
