"""A NaN is named by its tensor; what is only large is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unmergeable.checkpoint.finite import require_finite
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import BadInput

WriteFolder = Callable[..., Path]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_tensor_and_the_checkpoint_are_named(
    value: float, dtype: torch.dtype, tmp_path: Path, single: WriteFolder
) -> None:
    tensors = {name: torch.ones(3, 3, dtype=dtype) for name in ("a.weight", "b.weight")}
    whole = Checkpoint.open(single(tmp_path / "whole", tensors))
    tensors["b.weight"][1, 2] = value
    spoiled = Checkpoint.open(single(tmp_path / "spoiled", tensors))
    require_finite({"base": whole})
    with pytest.raises(BadInput, match=r"b\.weight: expert holds NaN or infinity"):
        require_finite({"base": whole, "expert": spoiled})


def test_sums_that_overflow_and_integers_are_no_nan(tmp_path: Path, single: WriteFolder) -> None:
    tensors = {"a.weight": torch.full((1000,), 3e38), "ids": torch.arange(3), "empty": torch.zeros(0, 3)}
    calls: list[tuple[int, int]] = []
    source = Checkpoint.open(single(tmp_path, tensors))
    require_finite({"base": source}, progress=lambda stage, done, total, unit: calls.append((done, total)))
    assert calls[-1] == (3, 3)
