"""Every argument reaches the library as what it means, under the name the library gives it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from unmergeable import ops as library
from unmergeable.cli.merge import parse_expert
from unmergeable.cli.passphrase import VARIABLE

from .conftest import RecordingOps, Run

Runner = Callable[..., Run]


@pytest.fixture(autouse=True)
def no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


class Asked(Exception):
    """Ends a command once the library has been called: what it prints is another test's concern."""


def asked(ops: RecordingOps, run: Runner, *arguments: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments and options that a command calls the library with, progress left out."""
    ops.answer = Asked()
    assert "Asked" in run(*arguments, "--quiet").stderr
    ((name, positional, options),) = ops.calls
    # The stand-in takes anything; the library must as well.
    inspect.signature(getattr(library, name)).bind(*positional, **options)
    return positional, {name: value for name, value in options.items() if name != "progress"}


def test_protect_by_default(ops: RecordingOps, run: Runner) -> None:
    positional, options = asked(ops, run, "protect", "expert", "--base", "base", "--out", "out")

    assert positional == (Path("expert"),)
    assert options == {
        "base": Path("base"),
        "out": Path("out"),
        "method": None,
        "settings": {},
        "key": None,
        "seed": None,
        "passphrase": None,
        "part": None,
        "data": None,
        "head": None,
        "encoder": None,
        "siblings": [],
        "generic": None,
        "keep_adapter": False,
        "dry_run": False,
        "allow_pickle": False,
        "threads": None,
        "ray": None,
        "workers": None,
    }


def test_protect_with_everything(ops: RecordingOps, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "correct horse")
    words = "--method mergelock,params --set condition=2 --set params.largest=5"
    words += " --key k --seed 3 --dry-run --allow-pickle --threads 2"

    _, options = asked(ops, run, "protect", "e", "--base", "b", "--out", "o", *words.split())

    assert options["method"] == ["mergelock", "params"]
    assert options["settings"] == {"condition": "2", "params.largest": "5"}
    assert (options["key"], options["seed"], options["threads"]) == (Path("k"), 3, 2)
    assert (options["dry_run"], options["allow_pickle"]) == (True, True)
    assert options["passphrase"] == "correct horse"


def test_protect_without_a_key(ops: RecordingOps, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "correct horse")  # it may be set for other commands
    words = "--method mergeguard,sensitivity_shield --data d --head h --encoder e --sibling s --sibling t --seed 3"

    _, options = asked(ops, run, "protect", "e", "--base", "b", "--out", "o", *words.split())

    paths = {"data": Path("d"), "head": Path("h"), "encoder": Path("e"), "siblings": [Path("s"), Path("t")]}
    assert {name: options[name] for name in paths} == paths
    assert (options["seed"], options["passphrase"]) == (3, None)


@pytest.mark.parametrize("option", [("--key", "k"), ("--passphrase",)])
def test_a_key_where_none_is_made_is_refused(option: tuple[str, ...], ops: RecordingOps, run: Runner) -> None:
    shown = run("protect", "e", "--base", "b", "--out", "o", "--method", "mergebarrier", *option)

    assert shown.exit_code == 2
    assert f"mergebarrier makes no key: leave out {option[0]}" in shown.stderr
    assert not ops.calls


def test_protect_from_a_recipe(ops: RecordingOps, run: Runner, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"method": "mergelock", "settings": {"condition": 8}}))

    _, options = asked(ops, run, "protect", "e", "--base", "b", "--out", "o", "--recipe", recipe)

    assert (options["method"], options["settings"]) == (["mergelock"], {"condition": 8})


@pytest.mark.parametrize("more", [("--method", "mergelock"), ("--set", "condition=2")])
def test_a_recipe_is_the_whole_recipe(more: tuple[str, str], run: Runner, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"method": "mergelock"}')

    shown = run("protect", "e", "--base", "b", "--out", "o", "--recipe", recipe, *more)

    assert shown.exit_code == 2
    assert "--recipe" in shown.stderr


@pytest.mark.parametrize("assignment", ["condition", "=2"])
def test_a_setting_needs_name_and_value(assignment: str, run: Runner) -> None:
    shown = run("protect", "e", "--base", "b", "--out", "o", "--set", assignment)

    assert shown.exit_code == 2
    assert "name=value" in shown.stderr


def test_a_passphrase_is_never_an_argument(run: Runner) -> None:
    shown = run("protect", "e", "--base", "b", "--out", "o", "--passphrase=secret")

    assert shown.exit_code == 2
    assert "--passphrase" in shown.stderr


def test_restore(ops: RecordingOps, run: Runner) -> None:
    positional, options = asked(ops, run, "restore", "p", "--key", "k", "--out", "o")

    assert positional == (Path("p"),)
    assert options == {"key": Path("k"), "out": Path("o"), "passphrase": None, "threads": None}


def test_verify(ops: RecordingOps, run: Runner) -> None:
    positional, options = asked(ops, run, "verify", "a", "b", "--probe", "p", "--base", "c")

    assert positional == (Path("a"), Path("b"))
    assert options == {"base": Path("c"), "probe": Path("p"), "threads": None}


def test_merge(ops: RecordingOps, run: Runner) -> None:
    words = "--expert x=0.5 --expert y --method ties --set density=0.4 --base b --out o"

    positional, options = asked(ops, run, "merge", *words.split())

    assert positional == ()
    assert options == {
        "base": Path("b"),
        "experts": [(Path("x"), 0.5), (Path("y"), None)],
        "method": "ties",
        "out": Path("o"),
        "settings": {"density": "0.4"},
        "data": [],
        "config": None,
        "backend": "own",
        "keep_adapter": False,
        "dtype": None,
        "template": None,
        "tokenizer": None,
        "allow_pickle": False,
        "checksums": False,
        "threads": None,
    }


@pytest.mark.parametrize(
    ("words", "template", "tokenizer"),
    [("--template base --tokenizer union", "base", "union"), ("--template 2 --tokenizer 1", 2, 1)],
)
def test_whose_parts_and_tokens_a_merge_has(
    words: str, template: str | int, tokenizer: str | int, ops: RecordingOps, run: Runner
) -> None:
    command = "merge --expert x --method linear --out o --dtype bfloat16 --allow-pickle"
    _, options = asked(ops, run, *command.split(), *words.split())
    assert (options["template"], options["tokenizer"], options["dtype"]) == (template, tokenizer, "bfloat16")
    assert options["allow_pickle"] is True
    refused = run(*command.split(), "--template", "union")
    assert refused.exit_code == 2
    assert "--template union: give base or the number of an --expert" in refused.stderr


def test_merge_by_configuration(ops: RecordingOps, run: Runner) -> None:
    _, options = asked(ops, run, "merge", "c.yaml", "--out", "o", "--backend", "mergekit", "--checksums")

    assert (options["config"], options["backend"], options["checksums"]) == (Path("c.yaml"), "mergekit", True)
    assert (options["experts"], options["method"], options["settings"]) == ([], None, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x", (Path("x"), None)),
        ("x=0.3", (Path("x"), 0.3)),
        ("x=-1e-2", (Path("x"), -0.01)),
        ("runs/lr=x", (Path("runs/lr=x"), None)),
        ("runs/lr=x=1", (Path("runs/lr=x"), 1.0)),
        ("runs/lr=0.1=1", (Path("runs/lr=0.1"), 1.0)),
        ("x=", (Path("x="), None)),
        ("=1", (Path("=1"), None)),
    ],
)
def test_a_coefficient_is_a_number_after_the_last_equals_sign(text: str, expected: object) -> None:
    assert parse_expert(text) == expected


def test_a_folder_may_be_called_like_a_coefficient(tmp_path: Path) -> None:
    """``step=500`` is a folder where it is one and ``step`` is none."""
    folder = tmp_path / "step=500"
    assert parse_expert(str(folder)) == (tmp_path / "step", 500.0), "the control: nothing is there"
    folder.mkdir()
    assert parse_expert(str(folder)) == (folder, None)
    assert parse_expert(f"{folder}=0.5") == (folder, 0.5)
    (tmp_path / "step").mkdir()
    assert parse_expert(str(folder)) == (tmp_path / "step", 500.0)


@pytest.mark.parametrize("number", ["50%", "half", "", "0,5"])
def test_a_coefficient_that_is_no_number(number: str, tmp_path: Path) -> None:
    """What the line says to write is read; a folder of that name is one."""
    with pytest.raises(typer.BadParameter, match=r"is no number; write \S+=0\.5\.") as caught:
        parse_expert(f"{tmp_path}={number}")
    assert parse_expert(caught.value.message.removesuffix(".").rpartition(" ")[2]) == (tmp_path, 0.5)
    Path(f"{tmp_path}={number}").mkdir()
    assert parse_expert(f"{tmp_path}={number}") == (Path(f"{tmp_path}={number}"), None)


def test_recover(ops: RecordingOps, run: Runner) -> None:
    words = "p --base b --method source_subtraction --set x=1 --out o --source s --source t --threads 1"
    words += " --data d --head h --encoder e"

    positional, options = asked(ops, run, "recover", *words.split())

    assert positional == (Path("p"),)
    assert options == {
        "base": Path("b"),
        "method": "source_subtraction",
        "out": Path("o"),
        "sources": [Path("s"), Path("t")],
        "data": Path("d"),
        "head": Path("h"),
        "encoder": Path("e"),
        "settings": {"x": "1"},
        "allow_pickle": False,
        "threads": 1,
    }


def test_inspect(ops: RecordingOps, run: Runner) -> None:
    positional, options = asked(ops, run, "inspect", "c", "--base", "b", "--source", "s")

    assert (positional, options) == ((Path("c"),), {"base": Path("b"), "sources": [Path("s")], "allow_pickle": False})


@pytest.mark.parametrize("command", ["methods", "schema"])
def test_questions_without_arguments(command: str, ops: RecordingOps, run: Runner) -> None:
    assert asked(ops, run, command) == ((), {})
