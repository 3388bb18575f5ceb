"""The dtype codes of safetensors, their sizes, and the torch dtypes they name.

The tables need no torch; the functions that return torch objects import it when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unmergeable.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# In the order in which safetensors.save_file lays dtypes out: largest alignment first. SAVE_RANK relies on it.
_CODES: tuple[tuple[str, int, str], ...] = (
    ("U64", 8, "uint64"),
    ("I64", 8, "int64"),
    ("F64", 8, "float64"),
    ("C64", 8, "complex64"),
    ("F32", 4, "float32"),
    ("U32", 4, "uint32"),
    ("I32", 4, "int32"),
    ("BF16", 2, "bfloat16"),
    ("F16", 2, "float16"),
    ("U16", 2, "uint16"),
    ("I16", 2, "int16"),
    ("F8_E5M2FNUZ", 1, "float8_e5m2fnuz"),
    ("F8_E4M3FNUZ", 1, "float8_e4m3fnuz"),
    ("F8_E4M3", 1, "float8_e4m3fn"),
    ("F8_E5M2", 1, "float8_e5m2"),
    ("I8", 1, "int8"),
    ("U8", 1, "uint8"),
    ("BOOL", 1, "bool"),
)

ITEMSIZE: dict[str, int] = {code: itemsize for code, itemsize, _ in _CODES}
"""Bytes per element of every code this package reads and writes."""

SAVE_RANK: dict[str, int] = {code: rank for rank, (code, _, _) in enumerate(_CODES)}
"""Position of a dtype in the layout of ``safetensors.save_file``; the tensor's name breaks ties."""

PACKED = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"})
"""Codes that exist only in block-quantised checkpoints: recognised, never read."""

_TORCH_NAMES: dict[str, str] = {code: torch_name for code, _, torch_name in _CODES}
_CODE_OF: dict[str, str] = {f"torch.{torch_name}": code for code, _, torch_name in _CODES}


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype that stores ``code``.

    Raises:
        CheckpointError: for a code that is unknown, or that this build of torch lacks.
    """
    import torch

    dtype = getattr(torch, _TORCH_NAMES.get(code, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"dtype {code}: torch {torch.__version__} cannot hold it; convert the checkpoint.")
    return dtype


def dtype_code(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype.

    Raises:
        CheckpointError: for a dtype that safetensors cannot store.
    """
    code = _CODE_OF.get(str(dtype))
    if code is None:
        raise CheckpointError(f"safetensors cannot store {dtype}: cast the tensor to another dtype first.")
    return code
