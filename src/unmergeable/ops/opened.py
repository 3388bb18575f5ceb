"""Opening what the jobs work on: a checkpoint with its architecture, and a base that belongs to it."""

from __future__ import annotations

import os
from pathlib import Path

from unmergeable.architecture import Architecture, detect
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.source import RenamedSource, TensorSource
from unmergeable.errors import BadInput, Mismatch

AnyPath = str | os.PathLike[str]
"""A file or folder; where it names a checkpoint also ``hub:OWNER/NAME``."""


def open_with_architecture(
    folder: Path, *, base: Path | None = None, allow_pickle: bool = False
) -> tuple[TensorSource, Architecture]:
    """Open a checkpoint (a LoRA folder on ``base``) and find its symmetry map, reading headers only."""
    source = open_checkpoint(folder, base=base, allow_pickle=allow_pickle)
    return source, architecture_of(source)


def architecture_of(source: TensorSource) -> Architecture:
    """The architecture of an open checkpoint; raises UnsupportedArchitecture naming what does not fit."""
    return detect(source.config, {name: source.spec(name).shape for name in source.names})


def open_base(
    folder: Path, expert: TensorSource, architecture: Architecture, *, allow_pickle: bool = False
) -> TensorSource:
    """Open the base of ``expert``, under the expert's tensor names.

    The body must be the same network: every tensor with a symmetry, of the same shape. Output heads may differ, and
    so may a common prefix of the names.

    Raises:
        BadInput: there is nothing at ``folder``.
        UnsupportedArchitecture, Mismatch: it is another network; the message names the first tensor that tells.
    """
    if not folder.exists():
        raise BadInput(
            f"base {folder} does not exist; give the folder of the checkpoint this model was fine-tuned from."
        )
    return base_of(open_checkpoint(folder, allow_pickle=allow_pickle), expert, architecture)


def base_of(base: TensorSource, expert: TensorSource, architecture: Architecture) -> TensorSource:
    """An open base of ``expert``, under the expert's tensor names; raises as :func:`open_base`."""
    folder = base.description
    kinds = [source.config.get("model_type") or source.config.get("_class_name") for source in (expert, base)]
    if kinds[0] != kinds[1]:
        raise Mismatch(
            f"base {folder} is a {kinds[1]} model and {expert.description} a {kinds[0]}; give the checkpoint it was "
            "fine-tuned from."
        )
    names = _common_names(expert, base, architecture)
    # Embeddings and heads lie along the stream only: a fine-tune may have others.
    body = architecture.symmetry.select("query_key", "value_output", "heads", "feed_forward", "experts")
    for name in architecture.symmetry.tensors_of(body):
        other = names.get(name)
        if other is None:
            raise Mismatch(f"base {folder} has no tensor {name}, which {expert.description} has; is it the right base?")
        ours, theirs = expert.spec(name).shape, base.spec(other).shape
        if ours != theirs:
            raise Mismatch(
                f"tensor {name} is {list(ours)} in {expert.description} and {list(theirs)} in base {folder}; give the "
                "checkpoint it was fine-tuned from."
            )
    return base if all(name == other for name, other in names.items()) else RenamedSource(base, names)


def _common_names(expert: TensorSource, base: TensorSource, architecture: Architecture) -> dict[str, str]:
    """For each tensor of the expert that the base has too, its name in the base."""
    anchor = next(iter(architecture.symmetry.legs))
    available = set(base.names)
    candidates = [anchor]
    pieces = anchor.split(".")
    candidates += [".".join(pieces[start:]) for start in range(1, len(pieces))]
    candidates += sorted(name for name in available if name.endswith("." + anchor))
    found = next((name for name in candidates if name in available), anchor)
    if len(found) <= len(anchor):
        drop = anchor.removesuffix(found)
        names = {name: name.removeprefix(drop) for name in expert.names}
    else:
        add = found.removesuffix(anchor)
        names = {name: add + name for name in expert.names}
    # Output heads keep their names whatever the prefix of the body.
    matched = {name: other if other in available else name for name, other in names.items()}
    return {name: other for name, other in matched.items() if other in available}
