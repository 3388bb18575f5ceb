"""Dtypes of a merge by the names that people type, and those that a model is stored in."""

from __future__ import annotations

import torch

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges.mergekit.config import DTYPES


def named_dtype(name: str) -> torch.dtype:
    """Raises UsageError for a name that none has."""
    if name not in DTYPES:
        raise UsageError(f"no dtype is called {name!r}; known: {', '.join(DTYPES)}.")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def stored_dtype(template: TensorSource) -> str:
    """The one dtype of a model's weights, which mergekit is told to write. Raises BadInput where there are several."""
    uniform = uniform_dtype(template)
    if uniform is None:
        floats = _float_dtypes(template)
        raise BadInput(
            f"{template.description} stores {', '.join(floats)}, and mergekit writes one dtype only: choose it with "
            f"--dtype {floats[0]}."
        )
    return uniform


def uniform_dtype(template: TensorSource) -> str | None:
    """The one dtype of a model's weights; None where there are several."""
    floats = _float_dtypes(template)
    return floats[0] if len(floats) == 1 else None


def _float_dtypes(template: TensorSource) -> list[str]:
    """The floating-point dtypes of a model, the narrowest first."""
    dtypes = {torch_dtype(template.spec(name).dtype) for name in template.names}
    floats = sorted(
        (dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: (dtype.itemsize, str(dtype))
    )
    return [str(dtype).removeprefix("torch.") for dtype in floats]
