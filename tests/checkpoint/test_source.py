"""Two checkpoints that must hold the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.source import require_same_tensors, tensor_bytes
from unmergeable.errors import Mismatch

WriteFolder = Callable[..., Path]
TENSORS = {"a": torch.ones(2, 3), "b": torch.ones(4)}
DIFFERENT = {
    "missing": ({"a": torch.ones(2, 3)}, "tensor 'b' is in .*first but not in .*second"),
    "added": (TENSORS | {"c": torch.ones(1)}, "tensor 'c' is in .*second but not in .*first"),
    "reshaped": (TENSORS | {"a": torch.ones(3, 2)}, r"tensor 'a' is F32\[2, 3\] in .* but F32\[3, 2\]"),
}


@pytest.mark.parametrize(("tensors", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_the_first_difference_is_named(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path, single: WriteFolder
) -> None:
    first = Checkpoint.open(single(tmp_path / "first", TENSORS))
    second = Checkpoint.open(single(tmp_path / "second", tensors))
    require_same_tensors(first, first, "a checkpoint and itself", dtypes=True)
    with pytest.raises(Mismatch, match=f"base and expert: {message}"):
        require_same_tensors(first, second, "base and expert")


def test_dtypes_are_compared_on_request(tmp_path: Path, single: WriteFolder) -> None:
    first = Checkpoint.open(single(tmp_path / "first", TENSORS))
    second = Checkpoint.open(single(tmp_path / "second", {name: t.bfloat16() for name, t in TENSORS.items()}))
    require_same_tensors(first, second, "base and expert")
    with pytest.raises(Mismatch, match=r"F32.*BF16"):
        require_same_tensors(first, second, "base and expert", dtypes=True)


def test_bytes_of_a_tensor_are_not_copied_and_keep_it_alive() -> None:
    tensor = torch.zeros(3, dtype=torch.bfloat16)
    view = tensor_bytes(tensor)
    tensor.fill_(1)
    del tensor
    assert bytes(view) == torch.ones(3, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert bytes(tensor_bytes(torch.arange(6).view(2, 3).T)) == torch.tensor([0, 3, 1, 4, 2, 5]).numpy().tobytes()
    assert bytes(tensor_bytes(torch.tensor(True))) == b"\x01"
    assert bytes(tensor_bytes(torch.zeros(0, 2))) == b""
