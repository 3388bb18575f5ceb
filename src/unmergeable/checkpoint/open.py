"""Open whatever a folder holds: a safetensors checkpoint, an adapter on its base, or (if allowed) pickles."""

from __future__ import annotations

from pathlib import Path

from unmergeable.checkpoint.index import is_adapter, is_pickled
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.source import TensorSource


def open_checkpoint(folder: Path | str, *, base: Path | str | None = None, allow_pickle: bool = False) -> TensorSource:
    """Open a checkpoint folder for reading, headers only.

    Args:
        folder: a transformers or diffusers component folder, or a LoRA adapter.
        base: the checkpoint an adapter was trained on; ignored for a whole checkpoint.
        allow_pickle: read ``*.bin`` and ``*.pth`` with torch's restricted unpickler.

    Raises:
        CheckpointError: when the folder cannot be used; the message says why and what to do.
    """
    folder = Path(folder)
    if folder.is_dir() and is_adapter(folder) and base is not None:
        from unmergeable.checkpoint.adapter import AdaptedCheckpoint

        return AdaptedCheckpoint.open(
            folder, open_checkpoint(base, allow_pickle=allow_pickle), allow_pickle=allow_pickle
        )
    if allow_pickle and folder.is_dir() and is_pickled(folder):
        from unmergeable.checkpoint.pickled import PickledCheckpoint

        return PickledCheckpoint.open(folder)
    return Checkpoint.open(folder)
