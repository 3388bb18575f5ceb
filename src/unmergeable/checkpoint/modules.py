"""The modules that sentence-transformers keeps around a network: pooling, dense layers, normalisation.

``modules.json`` lists them in order, each with its folder (``1_Pooling``) and class. Without them the network gives
embeddings of another kind, so they are part of a checkpoint: small files, and weights of layers that no protection of
the network touches. A folder whose class is itself a network is not copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from unmergeable.checkpoint.header import strict_json

MODULES_NAME = "modules.json"

COPIED = ("config.json", "model.safetensors")
MAX_BYTES = 256_000_000
"""A dense layer takes a few megabytes; what is larger is no layer around a network."""

_FOLDER = re.compile(r"\d+_[A-Za-z]\w*")
_CLASSES = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout", "WeightedLayerPooling", "SpladePooling")


def module_folders(text: bytes) -> Iterator[str]:
    """The folders of modules that stand around the network, from the text of ``modules.json``.

    Raises:
        CheckpointError: it is no JSON.
    """
    listed = strict_json(text, MODULES_NAME)
    for entry in listed if isinstance(listed, list) else ():
        path, kind = (str(entry.get(key, "")) for key in ("path", "type")) if isinstance(entry, dict) else ("", "")
        if _FOLDER.fullmatch(path) and kind.rpartition(".")[2] in _CLASSES:
            yield path


def module_folders_of(side_files: Iterable[str]) -> tuple[str, ...]:
    """The folders among the files that are copied beside a network."""
    return tuple(dict.fromkeys(name.rpartition("/")[0] for name in side_files if "/" in name))


def is_module_file(name: str) -> bool:
    """Whether a copied file, by its path in the checkpoint, holds the weights of such a module."""
    return Path(name).name == COPIED[1] and "/" in name
