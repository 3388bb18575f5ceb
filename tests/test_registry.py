"""Methods of other packages stand beside this package's own, and cannot break them."""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from unmergeable.errors import UsageError
from unmergeable.registry import Registry, Requirements


@dataclass(frozen=True)
class Own:
    name: ClassVar[str] = "own"


@dataclass(frozen=True)
class Theirs:
    name: ClassVar[str] = "theirs"


@pytest.fixture
def registry() -> Registry:
    return Registry("merge", "unmergeable.test_group", (Own,))


def announce(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    found = [importlib.metadata.EntryPoint(name, value, "unmergeable.test_group") for name, value in points.items()]

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [point for point in found if point.group == group]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_a_registered_class_is_found_by_its_name(registry: Registry) -> None:
    assert "theirs" not in registry

    assert registry.register(Theirs) is Theirs

    assert list(registry) == ["own", "theirs"]
    assert registry.require("theirs") is Theirs
    registry.register(Theirs)  # a module that is imported twice is no conflict


@pytest.mark.parametrize("value", [f"{__name__}:Own", f"{__name__}:Theirs"])
def test_an_announced_class_is_found_without_an_import(
    value: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(monkeypatch, point=value)

    assert registry.require("own") is Own
    assert len(registry) == len({"own", value.rpartition(":")[2].lower()})


def test_a_name_that_is_taken_is_refused(registry: Registry) -> None:
    class Other:
        name = "own"

    with pytest.raises(UsageError, match=r"a merge called 'own' exists .*choose another name"):
        registry.register(Other)
    assert registry["own"] is Own


def test_a_class_without_a_name_is_refused(registry: Registry) -> None:
    class Nameless:
        pass

    with pytest.raises(UsageError, match="Nameless has no name"):
        registry.register(Nameless)


def test_a_package_that_cannot_be_imported_breaks_nothing_else(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    announce(monkeypatch, gone="a_package_that_is_not_installed:Gone")

    with caplog.at_level(logging.WARNING):
        assert list(registry) == ["own"]

    assert "'gone' of another package is left out" in caplog.text
    with pytest.raises(UsageError, match=r"merge 'gone' cannot be used \(No module named"):
        registry.require("gone")


def test_an_unknown_name_is_answered_with_the_nearest(registry: Registry) -> None:
    with pytest.raises(UsageError, match="no merge is called 'onw'; did you mean 'own'"):
        registry.require("onw")
    with pytest.raises(KeyError):
        registry["onw"]


def test_what_is_read_is_what_is_needed_and_what_is_of_use() -> None:
    requirements: Any = Requirements(needs=("base",), accepts=("sources",))

    assert requirements.reads == {"base", "sources"}
    assert not requirements.exact
