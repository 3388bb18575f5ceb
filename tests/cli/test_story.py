"""The commands on a real checkpoint, one after another, as an owner and then an attacker would use them."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from unmergeable.cli import main
from unmergeable.cli.passphrase import VARIABLE
from unmergeable.demo.story import DemoResult
from zoo import TOYS, write_toy

from .test_documentation import table


@dataclass(frozen=True)
class Told:
    """One command with and without ``--json``; both wrote, each to its own folder."""

    document: dict[str, Any]
    text: str


def call(*arguments: object) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        exit_code = main([str(argument) for argument in arguments])
    return exit_code, stdout.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("story")
    write_toy(TOYS["llama"], folder / "base", seed=0)
    write_toy(TOYS["llama"], folder / "other", seed=2)
    write_toy(TOYS["llama"], folder / "expert", seed=1)
    (folder / "expert" / "pytorch_model.bin").write_bytes(b"an old copy")
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def story(folder: Path) -> dict[str, Told]:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.delenv(VARIABLE, raising=False)
        patch.chdir(folder)
        story = {}
        for command in (
            "protect expert --base base --out release",
            "restore release --key release.key --out restored",
            "verify expert release",
            "merge --base base --expert release=0.5 --expert other --method task_arithmetic --out merged",
            "recover release --base base --method nearest_orbit --out recovered",
            "inspect release --base base",
            "methods",
            "schema",
        ):
            code, output = call(*command.split(), "--json")
            again, text = call(*re.sub(r"(?<=--out )(\w+)", r"\1-2", command).split())
            assert (code, again) == (0, 0), command
            story[command.split()[0]] = Told(json.loads(output), text)
    return story


def documented_keys(command: str) -> list[str]:
    return sorted(key.strip("` ") for cell in table(command, "JSON key") for key in cell.split(","))


@pytest.mark.parametrize("command", ["protect", "restore", "verify", "merge", "recover", "inspect", "methods"])
def test_json_is_as_documented(command: str, story: dict[str, Told]) -> None:
    assert documented_keys(command) == sorted(story[command].document)


def test_json_of_the_demo_is_as_documented() -> None:
    result = DemoResult(rows=(), page=Path("report.html"), facts={})

    assert documented_keys("demo") == sorted(result.to_json())


def test_protect_tells_what_the_owner_must_know(story: dict[str, Told], folder: Path) -> None:
    text, document = story["protect"].text, story["protect"].document

    assert (folder / "release" / "model.safetensors").is_file()
    assert (folder / "release.key").stat().st_mode & 0o777 == 0o600
    assert "Protected: release-2" in text
    assert "Key: release-2.key" in text
    assert "never upload it" in text
    assert "Left out: pytorch_model.bin" in text
    assert "does not stop an attacker who holds the base" in text
    assert "unmergeable recover release-2 --base base --method nearest_orbit --out release-2-recovered" in text
    assert re.search(r"Largest error of a block: \S+ relative; bound \S+", text)
    assert 0 < document["measured_block_error"] <= document["predicted_block_error"]


def test_the_secret_stays_in_the_key_file(story: dict[str, Told], folder: Path) -> None:
    secret = json.loads((folder / "release.key").read_text())["secret"]

    assert secret not in json.dumps([told.document for told in story.values()])
    assert secret not in (folder / "release" / "unmergeable.json").read_text()


def test_the_others_say_what_they_did(story: dict[str, Told]) -> None:
    assert story["restore"].text.startswith("Restored: restored-2 ")
    assert story["verify"].text.startswith("Equal up to rounding: expert and release ")
    assert "  0.5 of release\n  0.3 of other" in story["merge"].text
    assert "Recovered: recovered-2 (nearest_orbit" in story["recover"].text
    assert "Verdict: its unmergeable.json says: protected by gauge." in story["inspect"].text
    assert "mergelock" in story["methods"].text
    assert json.loads(story["schema"].text) == story["schema"].document


def test_a_dry_run_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))

    code, text = call("protect", "expert", "--base", "base", "--out", "dry", "--dry-run", "--quiet")

    assert (code, sorted(folder.rglob("*"))) == (0, before)
    assert "Would protect: dry" in text
    assert "Dry run: nothing was written." in text


def test_different_checkpoints_are_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)

    code, text = call("verify", "expert", "other", "--quiet")

    assert code == 4
    assert text.startswith("Not equal: other does not compute what expert computes: ")


def test_a_passphrase_guards_the_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv(VARIABLE, "correct horse")
    assert main(["protect", "expert", "--base", "base", "--out", "guarded", "--quiet"]) == 0

    monkeypatch.setenv(VARIABLE, "wrong horse")
    assert main(["restore", "guarded", "--key", "guarded.key", "--out", "opened", "--quiet"]) == 5
    assert not (folder / "opened").exists()

    monkeypatch.setenv(VARIABLE, "correct horse")
    assert main(["restore", "guarded", "--key", "guarded.key", "--out", "opened", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "horse" not in shown.out + shown.err


def test_a_public_seed_is_warned_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)

    assert main(["protect", "expert", "--base", "base", "--out", "seeded", "--seed", "7", "--dry-run", "--quiet"]) == 0

    assert "warning: the key is drawn from the public seed 7" in capsys.readouterr().err
