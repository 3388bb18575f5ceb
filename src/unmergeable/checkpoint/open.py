"""Open whatever a folder holds: a safetensors checkpoint, an adapter on its base, or (if allowed) pickles."""

from __future__ import annotations

import os
import re
from pathlib import Path

from unmergeable.checkpoint.listing import ADAPTER_CONFIG_NAME, Kind, Listing, list_folder
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import CheckpointError

_WHOLE_MODEL = re.compile(r"(diffusion_pytorch_)?model[-.]")


def open_checkpoint(
    folder: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, allow_pickle: bool = False
) -> TensorSource:
    """Open a checkpoint folder for reading: list it once, and read the header of each file once.

    Args:
        folder: a transformers or diffusers component folder, or an adapter.
        base: the checkpoint an adapter was trained on; ignored for a whole checkpoint.
        allow_pickle: read ``*.bin`` and ``*.pth`` with torch's restricted unpickler.

    Raises:
        CheckpointError: when the folder cannot be used; the message says why and what to do.
    """
    listing = list_folder(folder)
    if listing.is_adapter:
        _require_one_model(listing)
    if listing.is_adapter and base is not None:
        from unmergeable.checkpoint.adapter import AdaptedCheckpoint

        return AdaptedCheckpoint.open(
            listing, open_checkpoint(base, allow_pickle=allow_pickle), allow_pickle=allow_pickle
        )
    if allow_pickle and listing.is_pickled and not listing.is_adapter:
        from unmergeable.checkpoint.pickled import PickledCheckpoint

        return PickledCheckpoint.open(listing)
    return Checkpoint.open(listing)


def split_adapter(model: str, folder: Path = Path()) -> tuple[Path, Path | None]:
    """A model as mergekit writes it, ``BASE+ADAPTER`` or a folder: the folder and the adapter on it, if there is one.

    Relative paths start at ``folder``. A folder whose name has a plus is one.
    """
    if "+" not in model or (folder / model).exists():
        return folder / model, None
    path, adapter = model.split("+", 1)
    return folder / path, folder / adapter


def _require_one_model(listing: Listing) -> None:
    """Refuse a folder in which an adapter and a whole model lie: nobody can tell which of them is meant."""
    whole = [name for name in listing.names(Kind.WEIGHTS, Kind.WEIGHTS_INDEX) if _WHOLE_MODEL.match(name)]
    if whole:
        raise CheckpointError(
            f"{listing.folder} holds an adapter ({ADAPTER_CONFIG_NAME}) and a whole model ({whole[0]}): move one of "
            "them into a folder of its own."
        )
