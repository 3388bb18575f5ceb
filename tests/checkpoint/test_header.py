"""Headers: built as safetensors builds them, believed only when every claim holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from unmergeable.checkpoint.dtypes import ITEMSIZE, dtype_code, torch_dtype
from unmergeable.checkpoint.header import (
    MAX_HEADER_BYTES,
    TensorSpec,
    build_header,
    parse_header,
    read_header,
    save_file_order,
)
from unmergeable.checkpoint.source import tensor_bytes
from unmergeable.errors import CheckpointError

# Names with quotes, escapes, control-free Unicode: JSON must escape them as safetensors does.
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
SPECS = st.builds(TensorSpec, st.sampled_from(sorted(ITEMSIZE)), st.lists(st.integers(0, 4), max_size=3).map(tuple))


def tensor_of(spec: TensorSpec) -> torch.Tensor:
    data = torch.arange(spec.nbytes, dtype=torch.uint8) % 2  # 0 and 1: valid for booleans too
    return (
        data.view(torch_dtype(spec.dtype)).reshape(spec.shape)
        if spec.nbytes
        else torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    )


@given(st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), SPECS, max_size=6), st.booleans())
def test_bytes_equal_those_of_save_file(specs: dict[str, TensorSpec], has_metadata: bool) -> None:
    tensors = {name: tensor_of(spec) for name, spec in specs.items()}
    metadata = {"format": "pt"} if has_metadata else None

    order = save_file_order(specs)
    ours = build_header([(name, specs[name]) for name in order], metadata)
    ours += b"".join(bytes(tensor_bytes(tensors[name])) for name in order)

    assert ours == save(tensors, metadata=metadata)


@given(st.dictionaries(NAMES.filter(str.isprintable), SPECS, max_size=6))
def test_parsing_gives_back_what_was_built(specs: dict[str, TensorSpec]) -> None:
    specs.pop("__metadata__", None)
    raw = build_header(specs.items(), {"format": "pt"})
    size = len(raw) + sum(spec.nbytes for spec in specs.values())

    header = parse_header(raw[8:], "x.safetensors", size)

    assert header.metadata == {"format": "pt"}
    assert header.nbytes == len(raw)
    assert {entry.name: entry.spec for entry in header.entries} == specs
    assert all(entry.end - entry.begin == entry.spec.nbytes for entry in header.entries)


@pytest.mark.parametrize("code", sorted(ITEMSIZE))
def test_every_code_has_its_torch_dtype(code: str) -> None:
    dtype = torch_dtype(code)
    assert dtype.itemsize == ITEMSIZE[code]
    assert dtype_code(dtype) == code


def test_a_dtype_safetensors_lacks_is_refused() -> None:
    with pytest.raises(CheckpointError, match="complex128"):
        dtype_code(torch.complex128)


GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]},
}
GOOD_BYTES = 16


def spoiled(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def entry(**changes: Any) -> dict[str, Any]:
    return {**GOOD["b"], **changes}


MALFORMED = {
    "not an object": ("[]", "does not start with"),
    "not JSON": ('{"a": ', "not valid JSON"),
    "trailing text": (json.dumps(GOOD) + "x", "not valid JSON"),
    "nested too deeply": ('{"a":' * 100_000, "not valid JSON"),
    "a number too long to convert": ('{"a": ' + "1" * 10_000 + "}", "not valid JSON"),
    "a key twice": ('{"a": 1, "a": 2}', "appears twice"),
    "a nested key twice": ('{"a": {"dtype": "F32", "dtype": "F16"}}', "appears twice"),
    "metadata not text": (spoiled(__metadata__={"format": 1}), "__metadata__"),
    "metadata a list": (spoiled(__metadata__=["pt"]), "__metadata__"),
    "entry not an object": (spoiled(b=[1]), "needs exactly dtype"),
    "key missing": (spoiled(b={"dtype": "F32", "shape": [2]}), "needs exactly dtype"),
    "key too many": (spoiled(b=entry(strides=[1])), "needs exactly dtype"),
    "unknown dtype": (spoiled(b=entry(dtype="F128")), "unknown dtype"),
    "dtype a list": (spoiled(b=entry(dtype=["F32"])), "unknown dtype"),
    "packed dtype": (spoiled(b=entry(dtype="F4")), "already quantised"),
    "negative size": (spoiled(b=entry(shape=[-2, -2])), "not a list of sizes"),
    "size true": (spoiled(b=entry(shape=[True, 4])), "not a list of sizes"),
    "size a float": (spoiled(b=entry(shape=[2.0, 2])), "not a list of sizes"),
    "size beyond 64 bits": (spoiled(b=entry(shape=[0, 2**70], data_offsets=[8, 8])), "not a list of sizes"),
    "rank beyond reason": (spoiled(b=entry(shape=[1] * 65, data_offsets=[8, 10])), "not a list of sizes"),
    "one offset": (spoiled(b=entry(data_offsets=[8])), "no extent"),
    "offsets backwards": (spoiled(b=entry(data_offsets=[16, 8])), "no extent"),
    "negative offset": (spoiled(b=entry(data_offsets=[-8, 0])), "no extent"),
    "extent too small": (spoiled(b=entry(data_offsets=[8, 12])), "takes 8 bytes"),
    "extent too large": (spoiled(b=entry(data_offsets=[8, 20])), "takes 8 bytes"),
    "overlap": (spoiled(b=entry(data_offsets=[4, 12])), "overlaps"),
    "the same bytes": (spoiled(b=entry(data_offsets=[0, 8])), "overlaps"),
    "hole": (spoiled(b=entry(data_offsets=[12, 20])), "hole of 4 bytes"),
    "hole at the start": ('{"a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}', "hole of 8 bytes"),
    "empty name": (spoiled(**{"": entry(data_offsets=[16, 24])}), "empty name"),
    "line break in a name": (spoiled(**{"x\ny": entry(data_offsets=[16, 24])}), "unprintable"),
}


def test_the_header_that_is_spoiled_is_good() -> None:
    raw = json.dumps(GOOD).encode()
    assert len(parse_header(raw, "x.safetensors", 8 + len(raw) + GOOD_BYTES).entries) == 2


@pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_header_is_refused_in_one_line(text: str, message: str) -> None:
    raw = text.encode()
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_header(raw, "x.safetensors", 8 + len(raw) + GOOD_BYTES)
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not valid JSON"):
        parse_header(b'{"\xff\xfe": 1}', "x.safetensors", 100)


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is 0 bytes, its header alone takes 8"),
    "cut in the length": (lambda data: data[:5], "is 5 bytes"),
    "cut in the header": (lambda data: data[:40], "truncated shard: x.safetensors is 40 bytes"),
    "cut in the data": (lambda data: data[:-3], "truncated shard: x.safetensors is .* its header promises"),
    "longer": (lambda data: data + b"smuggled", "8 bytes follow the last tensor"),
    "header beyond the limit": (
        lambda data: (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + data[8:],
        "promises a header of 100,000,001 bytes",
    ),
    "header of 2^64 - 1": (lambda data: b"\xff" * 8 + data[8:], "promises a header"),
    "Git LFS pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "zip archive": (lambda data: b"PK\x03\x04" + data, "promises a header|truncated"),
}


@pytest.mark.parametrize(("spoil", "message"), FILES.values(), ids=FILES)
def test_a_damaged_file_is_refused_in_one_line(spoil: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = save({"a": torch.ones(3), "b": torch.ones(2, 2)})
    path.write_bytes(whole)
    assert len(read_header(path, path.name).entries) == 2  # the control: unspoiled, it is accepted

    path.write_bytes(spoil(whole))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path, path.name)
    assert "\n" not in str(caught.value)


def test_a_name_cannot_be_written_twice() -> None:
    spec = TensorSpec("F32", (1,))
    with pytest.raises(CheckpointError, match="the name is taken"):
        build_header([("a", spec), ("a", spec)], None)
    with pytest.raises(CheckpointError, match="__metadata__"):
        build_header([("__metadata__", spec)], {"format": "pt"})
