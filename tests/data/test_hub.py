"""Data sets on the hub become local folders; nothing here reaches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from unmergeable.data import DataSource, download_data
from unmergeable.errors import BadInput

ROWS = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the hub was asked for."""
    calls: list[Any] = []

    def load(name: str, config: str | None, **options: Any) -> datasets.Dataset:
        calls.append((name, config, options))
        if name == "owner/gone":
            raise FileNotFoundError("Dataset 'owner/gone' doesn't exist\non the hub")
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return calls


def test_a_data_set_becomes_a_folder(asked: list[Any], tmp_path: Path) -> None:
    folder = download_data("hub:owner/name#test")
    assert [example.content for example in DataSource(folder)] == ["one", "two"]
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert download_data("hub:owner/name@v1:main#test") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written
    assert asked == [
        ("owner/name", None, {"split": "test", "revision": None}),
        ("owner/name", "main", {"split": "test", "revision": "v1"}),
    ]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("text", ["hub:owner/name", "hub:name#test", "owner/name#test", "hub:owner/name#", "hub:"])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(BadInput, match="no name of a data set; write hub:OWNER/NAME#SPLIT"):
        download_data(text)


@pytest.mark.usefixtures("asked")
def test_what_the_hub_says_is_one_line() -> None:
    with pytest.raises(BadInput) as error:
        download_data("hub:owner/gone#test")
    assert str(error.value) == (
        "hub:owner/gone#test cannot be downloaded (Dataset 'owner/gone' doesn't exist); check the name, your login, or "
        "download it."
    )
