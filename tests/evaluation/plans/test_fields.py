"""Documents: what YAML makes of a text that was meant, and names that can be shown, in one line with a remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmergeable.errors import BadInput
from unmergeable.evaluation.plans.fields import Entry, read_document, require_plain


def refused(text: str) -> str:
    with pytest.raises(BadInput) as error:
        require_plain(yaml.safe_load(text), "the plan")
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts: [{name: 2024-01-01}]", "the plan, experts 1, name: 2024-01-01 is a date to YAML; put it in quotes."),
        ("a: {b: 2024-01-01 10:00:00}", "the plan, a, b: 2024-01-01 10:00:00 is a datetime to YAML; put it in quotes."),
        ("a: !!set {x}", "the plan, a: {'x'} is a set to YAML; put it in quotes."),
        ("a: !!binary aGk=", "the plan, a: b'hi' is a bytes to YAML; put it in quotes."),
        ("no: 1", "the plan: the name False is a bool to YAML; put it in quotes."),
        ("a: {2024-01-01: 1}", "the plan, a: the name 2024-01-01 is a date to YAML; put it in quotes."),
        ("a: .nan", "the plan, a: nan is no number that can be used; give a finite one."),
        ("a: &x [*x]", "the plan, a 1: it contains itself; write out what is meant."),
    ],
)
def test_what_is_no_text_to_yaml(text: str, message: str) -> None:
    assert refused(text) == message


@pytest.mark.parametrize("text", ["a: 2024-13-45", "a: !!timestamp no", "a: [", "a: 1\n---\nb: 2"])
def test_what_yaml_cannot_read_is_one_line(text: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    with pytest.raises(BadInput, match=r"plan\.yaml \(a plan, docs/audit\.md\) is not valid YAML: ") as caught:
        read_document(plan, "docs/audit.md")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nobody.npz", "does not exist; correct the path, or make what lies there"),
        ("a" * 3000, "cannot be read (File name too long)"),
        ("a\0b", "cannot be read (embedded null byte)"),
    ],
)
def test_a_path_that_leads_nowhere(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"^the plan, data: .*{re.escape(reason)}\.$") as caught:
        Entry({"data": name}, ("data",), "the plan").path("data", tmp_path)
    assert len(str(caught.value)) < 500


def test_the_remedy_is_one() -> None:
    """Control: in quotes, the same is a text; and what is plain can be written as JSON."""
    document = yaml.safe_load("experts: [{name: '2024-01-01', on: [1, 2.5, true, null]}]".replace("on:", "'on':"))
    require_plain(document, "the plan")
    json.dumps(document, allow_nan=False)


def test_a_few_bytes_that_stand_for_many() -> None:
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))
    assert "more than 100000 entries" in refused(f"a0: &a0 [x]\n{levels}")


def entry(**values: Any) -> Entry:
    return Entry(values, tuple(values), "the plan, tasks 1")


@pytest.mark.parametrize("value", [True, 12, 1.5])
def test_a_name_that_yaml_reads_as_something_else(value: object) -> None:
    with pytest.raises(BadInput) as error:
        entry(name=value).name()
    assert str(error.value) == f"the plan, tasks 1, name: must be a text, not {value!r}; put it in quotes."
    with pytest.raises(BadInput, match="must be a list of names, not 12; put it in quotes"):
        entry(names=["a", 12]).texts("names")


@pytest.mark.parametrize("value", ["two\nlines", "a\x1b[31mred", "\u202eback"])
def test_a_name_that_cannot_be_shown(value: str) -> None:
    with pytest.raises(BadInput, match="must be one line of printable characters") as error:
        entry(name=value).name()
    assert str(error.value).isprintable()
    assert entry(name="Größe $x$, 2").name() == "Größe $x$, 2"


def test_true_or_false() -> None:
    assert entry(trust=True).flag("trust")
    assert not entry(trust=None).flag("trust")
    with pytest.raises(BadInput, match="must be true or false, not 'yes'"):
        entry(trust="yes").flag("trust")
