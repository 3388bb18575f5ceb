"""What a network knows of its data, written as a folder of safetensors that the merging engine reads like a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from unmergeable.checkpoint.disk import write_file, writing
from unmergeable.checkpoint.header import TensorSpec, save_file_order
from unmergeable.checkpoint.writer import ShardWriter

WEIGHTS_NAME = "model.safetensors"


def write_statistics(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    facts: Mapping[str, Any],
) -> str:
    """Write float32 tensors one by one, so that not all of them need to be there at once.

    Args:
        folder: to create; its parent must exist.
        shapes: of every tensor, by name.
        tensors: names and values, in sorted order of the names.
        facts: what the statistics are and of which data, kept as the folder's ``config.json``.

    Returns:
        The SHA-256 of the tensors' file, in hex.

    Raises:
        CheckpointError: the folder cannot be written, or the tensors are not those announced.
    """
    with writing(folder):
        folder.mkdir()
    specs = {name: TensorSpec("F32", shape) for name, shape in shapes.items()}
    announced = [(name, specs[name]) for name in save_file_order(specs)]
    with ShardWriter(folder / WEIGHTS_NAME, announced, {"format": "pt"}) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor.cpu())
        record = writer.finish()
    write_file(folder / "config.json", (json.dumps(dict(facts), indent=2) + "\n").encode())
    assert record.sha256 is not None, "files are hashed unless that is declined"
    return record.sha256
