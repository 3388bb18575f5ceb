"""Plans: what may be asked for, and the bytes that follow from it before any tensor is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unmergeable.checkpoint.header import TensorSpec
from unmergeable.checkpoint.plan import OutputTensor, edit_json, lay_out, output_like
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import CheckpointError, UsageError

WriteFolder = Callable[..., Path]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SPEC = TensorSpec("F32", (3,))


def ones() -> torch.Tensor:
    return torch.ones(3)


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_a_plan_like_the_source(two_shards: Path) -> None:
    source = Checkpoint.open(two_shards)
    plan = output_like(source, {"w01.weight": same})
    assert [tensor.name for tensor in plan] == list(source.names)
    assert [tensor.name for tensor in plan if tensor.edit] == ["w01.weight"]

    layout = lay_out(source, plan, None)
    for shard in layout.shards:
        data = (two_shards / shard.name).read_bytes()
        assert data.startswith(shard.header)
        assert shard.size == len(data)
    small = dict(layout.small_files)
    assert small == {name: (two_shards / name).read_bytes() for name in small}
    assert set(small) == {"config.json", "model.safetensors.index.json"}


def test_another_writers_header_is_kept(tmp_path: Path, single: WriteFolder) -> None:
    """Spacing, key order and padding that safetensors itself would not write."""
    folder = single(tmp_path, {"a.weight": torch.ones(2)})
    header = b'{ "a.weight": {"shape": [2], "data_offsets": [0, 8], "dtype": "F32"}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    source = Checkpoint.open(folder)
    (shard,) = lay_out(source, output_like(source, {"a.weight": same}), None).shards
    assert shard.header[8:] == header


def test_dropped_added_and_renamed_tensors(two_shards: Path) -> None:
    source = Checkpoint.open(two_shards)
    plan = output_like(source, {}, drop={"w00.weight"}, extra=[OutputTensor("head.weight", SPEC, FIRST, fill=ones)])
    plan = tuple(
        replace(tensor, name="renamed.weight", origin=tensor.name) if tensor.name == "v00.weight" else tensor
        for tensor in plan
    )
    layout = lay_out(source, plan, None)
    assert [job.name for job in layout.shards[0].jobs][-1] == "head.weight"
    small = dict(layout.small_files)
    index = json.loads(small["model.safetensors.index.json"])
    assert index["weight_map"]["head.weight"] == FIRST
    assert index["weight_map"]["renamed.weight"] == SECOND
    assert not index["weight_map"].keys() & {"w00.weight", "v00.weight"}
    assert index["metadata"]["total_size"] == sum(tensor.spec.nbytes for tensor in plan)


def test_one_file_becomes_two(tmp_path: Path, single: WriteFolder) -> None:
    source = Checkpoint.open(single(tmp_path, {"a.weight": torch.ones(3)}))
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    plan = (OutputTensor("a.weight", SPEC, names[0]), OutputTensor("b.weight", SPEC, names[1], fill=ones))
    small = dict(lay_out(source, plan, None).small_files)
    assert json.loads(small["model.safetensors.index.json"]) == {
        "metadata": {"total_parameters": 6, "total_size": 24},
        "weight_map": {"a.weight": names[0], "b.weight": names[1]},
    }


A = OutputTensor("a.weight", SPEC, "model.safetensors")
REFUSED: dict[str, tuple[tuple[OutputTensor, ...], str, type[Exception]]] = {
    "empty": ((), "empty", UsageError),
    "twice": ((A, A), "'a.weight' twice", UsageError),
    "two origins": ((replace(A, fill=ones, edit=same),), "at once", UsageError),
    "copied as something else": ((replace(A, spec=TensorSpec("BF16", (3,))),), "as BF16", UsageError),
    "scattered": (
        (A, OutputTensor("b", SPEC, "b.safetensors", fill=ones), OutputTensor("c", SPEC, A.shard, fill=ones)),
        "scatters",
        UsageError,
    ),
    "unknown": ((replace(A, origin="z"),), "no tensor 'z'", CheckpointError),
    "unsafe name": ((replace(A, shard="../x.safetensors"),), r"'\.\./x\.safetensors'", CheckpointError),
}


@pytest.mark.parametrize(("plan", "message", "kind"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_planned(
    plan: tuple[OutputTensor, ...], message: str, kind: type[Exception], tmp_path: Path, single: WriteFolder
) -> None:
    source = Checkpoint.open(single(tmp_path, {"a.weight": torch.ones(3)}))
    lay_out(source, (A,), None)  # the control
    with pytest.raises(kind, match=message):
        lay_out(source, plan, None)


def test_edits_of_tensors_that_do_not_exist(two_shards: Path) -> None:
    source = Checkpoint.open(two_shards)
    with pytest.raises(CheckpointError, match="no tensor 'ghost'"):
        output_like(source, {"ghost": same})
    with pytest.raises(CheckpointError, match="no tensor 'ghost'"):
        output_like(source, {}, drop={"ghost"})


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "two spaces": ('{\n  "b": 1,\n  "a": 1e-05\n}\n', {"a": False}, '{\n  "b": 1,\n  "a": false\n}\n'),
    "four spaces, no end of line": (
        '{\n    "a": 1\n}',
        {"c": {"d": 1}},
        '{\n    "a": 1,\n    "c": {\n        "d": 1\n    }\n}',
    ),
    "one line": ('{"a": {"x": 1, "y": 2}}', {"a": {"y": None}}, '{"a": {"x": 1, "y": null}}'),
    "not ASCII": ('{"a": "ü", "b": 1}', {"b": 2}, '{"a": "ü", "b": 2}'),
    "escaped": ('{"a": "\\u00fc", "b": 1}', {"b": 2}, '{"a": "\\u00fc", "b": 2}'),
    "replaced by an object": ('{"a": 1}', {"a": {"x": 1}}, '{"a": {"x": 1}}'),
}


@pytest.mark.parametrize(("text", "changes", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_changes_only_where_it_is_told_to(text: str, changes: dict[str, Any], expected: str) -> None:
    assert edit_json(text.encode(), changes).decode() == expected
