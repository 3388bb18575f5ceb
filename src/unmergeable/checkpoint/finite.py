"""Whether weights are numbers: a NaN in a checkpoint is named before anything is trained, ranked or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.source import RenamedSource, TensorSource
from unmergeable.errors import BadInput
from unmergeable.progress import Progress, silent
from unmergeable.threads import worker_threads

_PIECE_BYTES = 1 << 22


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # Any such element makes the sum so too, and a sum costs a twentieth of isfinite. It may also overflow by itself.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def not_finite(name: str, label: str) -> str:
    """The line for a tensor of a checkpoint that is not finite."""
    return f"{name}: {label} holds NaN or infinity there; repair or leave out that checkpoint."


Place = tuple[str, TensorSource, str]
"""What messages call a checkpoint, the checkpoint, and a tensor of it."""


def places_of(sources: Mapping[str, TensorSource]) -> list[Place]:
    """Every tensor of checkpoints, which are given by what messages call them."""
    return [(label, source, name) for label, source in sources.items() for name in source.names]


def require_finite(
    sources: Mapping[str, TensorSource], *, threads: int | None = None, progress: Progress = silent
) -> None:
    """Read every floating-point tensor once.

    Args:
        sources: checkpoints by what messages call them.
        threads: tensors read at a time; None for one per processor.
        progress: told of the tensors read.

    Raises:
        BadInput: naming the first tensor that holds NaN or infinity.
    """
    require_finite_at(places_of(sources), threads=threads, progress=progress)


def require_finite_at(places: Sequence[Place], *, threads: int | None = None, progress: Progress = silent) -> None:
    """As :func:`require_finite`, for some tensors."""
    pool = ThreadPoolExecutor(worker_threads(threads))
    try:
        for done, (found, (label, _, name)) in enumerate(
            zip(pool.map(_is_sound_at, places), places, strict=True), start=1
        ):
            if not found:
                raise BadInput(not_finite(name, label))
            progress("looking for NaN", done, len(places), "tensors")
    finally:
        pool.shutdown(cancel_futures=True)


def _is_sound_at(place: Place) -> bool:
    _, source, name = place
    return is_sound(source, name)


def is_sound(source: TensorSource, name: str) -> bool:
    """Whether a tensor holds no NaN or infinity; one of whole numbers, or of a byte each, cannot be told to."""
    dtype = torch_dtype(source.spec(name).dtype)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return True
    if isinstance(source, RenamedSource):
        return is_sound(source.original, source.original_name.get(name, name))
    if isinstance(source, Checkpoint):  # piece by piece, so that a large tensor is never held
        return all(is_finite(torch.frombuffer(piece, dtype=dtype)) for piece in source.raw_chunks(name, _PIECE_BYTES))
    return is_finite(source.tensor(name))
