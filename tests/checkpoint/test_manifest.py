"""The manifest: complete, free of paths, and able to tell when a file was altered."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unmergeable.checkpoint.listing import LeftOut
from unmergeable.checkpoint.manifest import (
    Alteration,
    FileRecord,
    Manifest,
    check_files,
    installed_version,
    read_manifest,
    record_file,
    record_header,
)
from unmergeable.errors import CheckpointError, UsageError

MANIFEST = Manifest(
    outputs=(FileRecord("model.safetensors", 3, hashlib.sha256(b"abc").hexdigest()),),
    inputs={
        "source": (FileRecord("model.safetensors", 1, "0" * 64), FileRecord("unread.safetensors", 8, None, "1" * 64))
    },
    left_out=(LeftOut("pytorch_model.bin", "may hold an unprotected copy of the weights"),),
    details={"recipe": {"method": "mergelock"}, "condition_number": 4.0},
)


def test_json_and_back() -> None:
    text = MANIFEST.to_json()
    assert Manifest.from_json(text) == MANIFEST
    record = json.loads(text)
    assert record["tool"] == "unmergeable"
    assert record["tool_version"] == installed_version()
    assert record["recipe"] == {"method": "mergelock"}
    assert list(record)[:3] == ["format_version", "tool", "tool_version"]


@pytest.mark.parametrize("key", ["tool", "outputs", "format_version"])
def test_the_callers_part_cannot_replace_the_librarys(key: str) -> None:
    with pytest.raises(UsageError, match=key):
        Manifest(outputs=(), details={key: 1}).to_json()


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), Path("x"), {"nested": b"x"}])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="'recipe' cannot be written as JSON"):
        Manifest(outputs=(), details={"recipe": value}).to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a manifest"),
        ('{"tool": "other"}', "not a manifest"),
        ('{"tool": "unmergeable", "format_version": 99}', "format 99"),
        ('{"tool": "unmergeable", "format_version": 1}', "not a complete manifest"),
        ('{"tool": "unmergeable", "format_version": 1, "outputs": [1]}', "not a complete manifest"),
        ("{", "not valid JSON"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(text)


def test_altered_files_are_found(tmp_path: Path) -> None:
    names = ("same", "altered", "resized", "missing")
    for name in names:
        (tmp_path / name).write_bytes(b"abc")
    manifest = Manifest(outputs=tuple(record_file(tmp_path / name) for name in names))
    (tmp_path / "unmergeable.json").write_text(manifest.to_json())
    assert read_manifest(tmp_path) == manifest
    assert check_files(tmp_path) == ()

    (tmp_path / "altered").write_bytes(b"abd")
    (tmp_path / "resized").write_bytes(b"abcd")
    (tmp_path / "missing").unlink()
    (tmp_path / "added").touch()
    assert check_files(tmp_path) == (
        Alteration("altered", "altered"),
        Alteration("resized", "resized"),
        Alteration("missing", "missing"),
        Alteration("added", "added"),
    )


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"no unmergeable\.json"):
        check_files(tmp_path)


def test_of_an_unread_file_the_header_is_compared(tmp_path: Path) -> None:
    """Altered weights go unnoticed, as stated; an altered header, and another size, do not."""
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.ones(4), "b.weight": torch.ones(4)}, path)
    whole = path.read_bytes()
    record = record_header(path)
    header = whole[: 8 + int.from_bytes(whole[:8], "little")]
    assert record == FileRecord(path.name, len(whole), None, hashlib.sha256(header).hexdigest())
    (tmp_path / "unmergeable.json").write_text(Manifest(outputs=(record,)).to_json())
    assert check_files(tmp_path) == ()
    for altered, problem in (
        (whole[:-1] + b"x", None),
        (whole.replace(b"a.weight", b"c.weight"), "altered"),
        (b"\xff" * 8 + whole[8:], "altered"),
        (whole + b"x", "resized"),
    ):
        path.write_bytes(altered)
        assert check_files(tmp_path) == ((Alteration(path.name, problem),) if problem else ())
