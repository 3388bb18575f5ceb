"""A state dict is read as a file is, and what a plan would write comes out without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unmergeable.checkpoint.memory import SHARD, MemorySource, written_in_memory
from unmergeable.checkpoint.plan import OutputTensor, output_like
from unmergeable.errors import CheckpointError


def state() -> dict[str, Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(2, dtype=torch.bfloat16)}


def test_a_tensor_that_is_read_is_a_contiguous_copy() -> None:
    tensors = {"turned": torch.arange(6.0).reshape(2, 3).T}
    read = MemorySource(tensors).tensor("turned")

    assert read.is_contiguous()
    assert torch.equal(read, tensors["turned"])
    read.zero_()
    assert tensors["turned"].sum() == 15


def test_specs_and_order_are_those_of_the_state_dict() -> None:
    source = MemorySource(state(), {"model_type": "x"})

    assert list(source.names) == ["a.weight", "b.bias"]
    assert (source.spec("b.bias").dtype, source.spec("b.bias").shape) == ("BF16", (2,))
    entries = source.index.entries
    assert entries["b.bias"].begin == entries["a.weight"].end == entries["a.weight"].begin + 24
    with pytest.raises(CheckpointError, match="has no tensor 'c'"):
        source.spec("c")


def test_the_digest_tells_values_apart() -> None:
    other = state()
    other["b.bias"][0] = 2

    assert MemorySource(state()).index.headers_digest == MemorySource(state()).index.headers_digest
    assert MemorySource(state()).index.headers_digest != MemorySource(other).index.headers_digest


def test_a_plan_is_carried_out_without_copying_what_stays() -> None:
    source = MemorySource(state())
    spec = source.spec("b.bias")
    added = OutputTensor("c", spec, SHARD, fill=lambda tensor: tensor.fill_(7))
    moved = OutputTensor("d", spec, SHARD, origin="b.bias")

    result = written_in_memory(source, output_like(source, {"a.weight": lambda t: t.neg_()}, extra=(added, moved)))

    assert list(result) == ["a.weight", "b.bias", "c", "d"]
    assert torch.equal(result["a.weight"], -source.tensors["a.weight"])
    assert result["b.bias"] is source.tensors["b.bias"]
    assert result["d"] is source.tensors["b.bias"]
    assert result["c"].tolist() == [7, 7]
