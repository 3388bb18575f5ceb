"""Settings: what a command line or a plan says becomes a frozen dataclass, or one line that names the mistake."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmergeable.attacks import ATTACKS
from unmergeable.errors import UsageError, shown
from unmergeable.merges import MERGES
from unmergeable.protections import PROTECTIONS
from unmergeable.settings import ADDED_LATER, configure, nearest, parse_assignments, settings_of

laws = settings(max_examples=100, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Method:
    name: ClassVar[str] = "method"

    condition: float = 4.0
    rank: int = 3
    signed: bool = True
    label: str = "x"
    trim: Literal["global", "tensor"] = "global"
    coefficients: tuple[float, ...] = (0.5,)

    def validate(self) -> None:
        if self.rank < 0:
            raise UsageError(f"method: rank must not be negative, not {self.rank}.")


@dataclass(frozen=True)
class Bare:
    """Without a name, without settings, without checks."""


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "condition": st.floats(allow_nan=False),
        "rank": st.integers(0, 10**30),
        "signed": st.booleans(),
        "label": st.text(),
        "trim": st.sampled_from(["global", "tensor"]),
        "coefficients": st.lists(st.floats(allow_nan=False, allow_infinity=False)),
    },
)


@laws
@given(values=SETTINGS)
def test_values_survive_json_and_the_command_line(values: dict[str, Any]) -> None:
    method = configure(Method, values)
    expected = {**values, **({"coefficients": tuple(values["coefficients"])} if "coefficients" in values else {})}
    assert {name: getattr(method, name) for name in values} == expected
    assert configure(Method, settings_of(method)) == method
    assert configure(Method, json.loads(json.dumps(settings_of(method)))) == method
    typed = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    assert configure(Method, typed) == method
    assert {type(getattr(method, field.name)) for field in fields(Method)} == {float, int, bool, str, tuple}


def test_defaults_need_nothing() -> None:
    assert configure(Method, {}) == Method()
    assert configure(Bare, {}) == Bare()
    assert settings_of(Bare()) == {}


@pytest.mark.parametrize("text", ["true", "True", "yes", "1", "FALSE", "no", "0"])
def test_booleans_are_read_as_people_write_them(text: str) -> None:
    assert configure(Method, {"signed": text}).signed == (text.lower() in {"true", "yes", "1"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("condition", "four"),
        ("condition", None),
        ("condition", [4.0]),
        ("condition", True),  # a bool is a number to Python, not to a reader
        ("condition", "True"),
        ("rank", "3.5"),
        ("rank", 3.5),
        ("rank", ""),
        ("rank", False),
        ("rank", -1),
        ("signed", "perhaps"),
        ("signed", 2),
        ("signed", None),
        ("trim", "Global"),
        ("trim", None),
        ("coefficients", "[0.5"),
    ],
)
def test_a_value_of_another_kind_is_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        configure(Method, {name: value})
    message = str(caught.value)
    assert message.startswith("method: ")
    assert name in message
    assert repr(value) in message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("conditon", "method has no setting 'conditon'; did you mean 'condition'?"),
        ("zzz", "method has no setting 'zzz'; known: condition, rank, signed, label, trim, coefficients."),
        ("name", "method has no setting 'name'; known: condition, rank, signed, label, trim, coefficients."),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(wrong: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        configure(Method, {wrong: 1})
    assert str(caught.value) == said


def test_a_method_without_settings_says_so() -> None:
    with pytest.raises(UsageError, match=r"^Bare has no setting 'rank'; it has none\.$"):
        configure(Bare, {"rank": 1})
    assert nearest("x", {}) == "; it has none."


def test_assignments_are_split_at_the_first_equals_sign() -> None:
    assert parse_assignments([]) == {}
    assert parse_assignments(["a=1", "b=", "c=x=y"]) == {"a": "1", "b": "", "c": "x=y"}


@pytest.mark.parametrize("assignments", [["a"], ["=1"], [""], ["a=1", "a=1"]])
def test_a_malformed_assignment_is_refused(assignments: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^--set .*\.$"):
        parse_assignments(assignments)


METHODS = [*PROTECTIONS.values(), *MERGES.values(), *ATTACKS.values()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_can_be_rebuilt_from_its_settings(method: Any) -> None:
    """Key files and manifests hold settings as JSON; a recipe read back must be the recipe."""
    default = configure(method, {})
    read_back = json.loads(json.dumps(settings_of(default)))
    assert read_back == settings_of(default)
    assert configure(method, read_back) == default
    assert configure(method, {name: str(value) for name, value in read_back.items()}) == default


def test_what_a_few_bytes_of_yaml_blow_up_to_is_refused_without_being_written_out() -> None:
    bomb: object = "lol"
    for _ in range(40):
        bomb = [bomb] * 9
    for key in ("condition", "rank", "signed", "label", "trim"):
        with pytest.raises(UsageError) as refused:
            configure(Method, {key: bomb})
        assert len(str(refused.value)) < 1000
    with pytest.raises(UsageError, match="must be of type"):
        configure(Method, {"coefficients": "[" * 100_000})


def test_a_message_shows_the_ends_of_a_long_value() -> None:
    assert shown("x" * 10_000).startswith("'xxx")
    assert len(shown("x" * 10_000)) <= 100
    assert shown({"a": [1, 2]}) == repr({"a": [1, 2]})


@dataclass(frozen=True)
class Grown:
    old: int = 1
    new: int = field(default=2, metadata=ADDED_LATER)


def test_a_setting_that_came_later_is_recorded_only_where_it_is_used() -> None:
    assert settings_of(Grown()) == {"old": 1}
    assert settings_of(Grown(new=3)) == {"old": 1, "new": 3}
    assert configure(Grown, settings_of(Grown(new=3))) == Grown(new=3)
    assert configure(Grown, {"old": 1}) == Grown()
