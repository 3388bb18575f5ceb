"""docs/command-line.md says what --help says: the same commands, the same options."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from unmergeable.cli.app import COMMANDS

from .conftest import Run

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
COMMON = {"--json", "--quiet", "--debug", "--help"}


def table(section: str, heading: str) -> list[str]:
    """First cells of the table under ``heading`` in a section, in order."""
    rows = re.findall(rf"^\| {heading} \|.*\n\|---.*\n((?:\|.*\n)*)", SECTIONS[section], re.MULTILINE)
    return [line.split("|")[1].strip() for block in rows for line in block.splitlines()]


def described_options(section: str) -> set[str]:
    return {cell.strip("`").split()[0] for cell in table(section, "option")}


def options_in_help(run: Callable[..., Run], *command: str) -> set[str]:
    text = run(*command, "--help").stdout.partition("Options:")[2]
    return set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE))


def test_the_page_has_every_command_in_order() -> None:
    assert [name for name in SECTIONS if name in COMMANDS] == list(COMMANDS)
    overview = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\)", PAGE, re.MULTILINE)
    assert overview == [(name, name) for name in COMMANDS]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_has_every_option(command: str, run: Callable[..., Run]) -> None:
    in_help = options_in_help(run, command)

    assert in_help >= COMMON, "the pattern finds options at all"
    assert described_options(command) == in_help - COMMON


def test_the_page_has_the_common_options(run: Callable[..., Run]) -> None:
    assert described_options("Every command") == COMMON
    assert options_in_help(run) == {*COMMON, "--version"}
    assert "--version" in PAGE


@pytest.mark.parametrize("command", COMMANDS)
def test_usage_lines_name_the_required_options(command: str, run: Callable[..., Run]) -> None:
    help_text = run(command, "--help").stdout
    options = help_text.partition("Options:")[2]
    entries = re.split(r"\n(?=  --)", options)
    required = {match[1] for entry in entries if "[required]" in entry and (match := re.search(r"(--[a-z]+)", entry))}
    usage = re.search(r"```\n(unmergeable .*?)\n```", SECTIONS[command], re.DOTALL)

    assert usage is not None
    assert set(re.findall(r"--[a-z]+", usage[1])) == required
