"""Open whatever a folder holds: a safetensors checkpoint, an adapter on its base, or (if allowed) pickles."""

from __future__ import annotations

import os

from unmergeable.checkpoint.listing import list_folder
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.source import TensorSource


def open_checkpoint(
    folder: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, allow_pickle: bool = False
) -> TensorSource:
    """Open a checkpoint folder for reading: list it once, and read the header of each file once.

    Args:
        folder: a transformers or diffusers component folder, or a LoRA adapter.
        base: the checkpoint an adapter was trained on; ignored for a whole checkpoint.
        allow_pickle: read ``*.bin`` and ``*.pth`` with torch's restricted unpickler.

    Raises:
        CheckpointError: when the folder cannot be used; the message says why and what to do.
    """
    listing = list_folder(folder)
    if listing.is_adapter and base is not None:
        from unmergeable.checkpoint.adapter import AdaptedCheckpoint

        return AdaptedCheckpoint.open(
            listing, open_checkpoint(base, allow_pickle=allow_pickle), allow_pickle=allow_pickle
        )
    if allow_pickle and listing.is_pickled and not listing.is_adapter:
        from unmergeable.checkpoint.pickled import PickledCheckpoint

        return PickledCheckpoint.open(listing)
    return Checkpoint.open(listing)
