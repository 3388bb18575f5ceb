"""Everything in float64: networks compute norms, softmax and positions in float32 whatever their weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}


class InFloat64(TorchFunctionMode):
    """Everything in float64: networks compute norms, softmax and positions in float32 whatever their weights are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return args[0].double()
        return func(*(_doubled(arg) for arg in args), **{name: _doubled(arg) for name, arg in (kwargs or {}).items()})


def _doubled(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in LOW_PRECISION else argument


@contextmanager
def in_float64() -> Iterator[None]:
    """What is built and computed inside is float64 throughout."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InFloat64():
            yield
    finally:
        torch.set_default_dtype(before)
