"""Every Python example of the documentation runs as it stands, and every command line is one that the program takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.main import get_command_name

from snippets import ROOT, Command, Example, commands, examples
from tasks.speakers import write_records, write_speaker
from unmergeable import ops
from unmergeable.cli import app
from unmergeable.evaluation.plans.releases import is_release
from unmergeable.merges.adapters import Combination

EXPERTS = ("my-finetune", "expert", "release", "theirs", "other")
TEXTS = [{"text": text, "label": number % 3} for number, text in enumerate(["abc", "de", "f", "ghij", "kl", "m"] * 4)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that examples speak of: a base under both of its names, fine-tunes of it, and data."""
    folder = tmp_path_factory.mktemp("stage")
    for base in ("the-base", "base", "my-model"):
        write_speaker(folder / base, "llama")
    weights = load_file(folder / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in EXPERTS:
        shutil.copytree(folder / "base", folder / name)
        moved = {key: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for key, tensor in weights.items()}
        save_file(moved, folder / name / "model.safetensors", metadata={"format": "pt"})
    write_speaker(folder / "my-classifier", "bert-classification")
    write_records(folder / "reviews.jsonl", ({"body": row["text"], "stars": row["label"]} for row in TEXTS))
    write_records(folder / "texts.jsonl", TEXTS)
    questions = [{"prompt": f"a{number}", "choices": ["b", "c"], "answer": number % 2} for number in range(40)]
    for name in ("quiz", "mine", "theirs"):
        write_records(folder / f"{name}.jsonl", questions)
    return folder


def python_examples() -> Iterator[Any]:
    for example in examples("python"):
        marks = [pytest.mark.slow] if example.is_slow else []
        yield pytest.param(example, marks=marks, id=example.name)


@pytest.mark.parametrize("example", list(python_examples()))
def test_python_examples_run(example: Example, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    shutil.copytree(stage, work)
    monkeypatch.chdir(work)
    if 'out="release"' in example.text:
        shutil.rmtree("release")
    if "register_" in example.text:  # in a process of its own, or other tests would meet the method
        subprocess.run([sys.executable, "-c", example.text], check=True, timeout=120)
    else:
        exec(compile("\n" * example.line + example.text, str(example.page), "exec"), {"__name__": "example"})


def test_the_example_of_analyses_prints_what_the_page_says(
    stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = [example for example in examples("python") if example.page.stem == "analysis"]
    monkeypatch.chdir(stage)
    exec(compile(example.text, str(example.page), "exec"), {})
    *parts, barrier = capsys.readouterr().out.splitlines()
    assert len(parts) == 6, "two layers of three parts"
    assert all(float(line.split()[-1]) <= float(line.split()[-2]) for line in parts), "canonical is no further away"
    assert float(barrier) >= 0


COMMANDS = list(commands("unmergeable"))


@pytest.fixture(scope="module")
def methods() -> Mapping[str, Mapping[str, Any]]:
    """Every method by name, as ``methods --json`` lists them."""
    document = ops.methods().to_json()
    return {entry["name"]: entry for kind in ("protections", "merges", "recoveries") for entry in document[kind]}


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line reads in these words; nothing is done. Raises click's usage errors."""
    _, name, *arguments = words
    command = app._command().commands[name]
    context = command.make_context(name, arguments)
    assert get_command_name(name) in app.COMMANDS
    found: dict[str, Any] = context.params
    return found


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_command_lines_are_understood(command: Command, methods: Mapping[str, Mapping[str, Any]]) -> None:
    if command.words[1].startswith("-") or command.words[1] == "COMMAND":
        return
    options = parsed(command.words)
    names = (options.get("method") or "").split(",") if options.get("method") != "auto" else []
    names = [name for name in names if name and name != "NAME"]
    if options.get("keep_adapter") and command.words[1] == "merge":  # merges of adapters are not those of checkpoints
        assert set(names) <= set(get_args(Combination))
        return
    assert set(names) <= set(methods)
    settings = {setting["name"] for name in names for setting in methods[name]["settings"]}
    if names:
        given = {text.split("=")[0].split(".")[-1] for text in options.get("assignments") or ()}
        assert given <= settings


def test_command_lines_were_found() -> None:
    assert len(COMMANDS) > 30
    assert {command.words[1] for command in COMMANDS} >= {"protect", "restore", "verify", "merge", "recover", "audit"}


def test_a_wrong_command_line_would_be_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(["unmergeable", "protect", "expert", "--bass", "base", "--out", "release"])


def modules_run() -> Iterator[Any]:
    for program in ("python -m", "python"):
        for command in commands(program):
            if not (program == "python" and command.words[1].startswith("-")):
                yield pytest.param(command, id=command.name)


@pytest.mark.parametrize("command", list(modules_run()))
def test_scripts_exist(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = command.words[1:]
    if first == "-m":
        monkeypatch.syspath_prepend(str(ROOT))
        assert find_spec(rest[0]) is not None
    else:
        assert (ROOT / first).is_file()


@pytest.mark.parametrize("example", list(examples("json")), ids=lambda example: example.name)
def test_json_examples_are_json(example: Example) -> None:
    json.loads(example.text)


def plans() -> Iterator[Any]:
    for example in examples("yaml"):
        if "of_another_package" not in example.text:
            yield pytest.param(example, id=example.name)


@pytest.mark.parametrize("example", list(plans()))
def test_plans_name_methods_and_settings_that_exist(example: Example, methods: Mapping[str, Any]) -> None:
    document = yaml.safe_load(example.text)
    entries = [
        *document.get("protect", {}).get("methods", []),
        *document.get("merges", []),
        *document.get("recoveries", []),
    ]
    for entry in entries:
        if is_release(entry):
            continue
        names = entry if isinstance(entry, str) else entry["method"]
        settings = {} if isinstance(entry, str) else entry.get("settings", {})
        for name in names.split(","):
            known = {setting["name"] for setting in methods[name.strip()]["settings"]}
            assert set(settings) <= known
    assert document
