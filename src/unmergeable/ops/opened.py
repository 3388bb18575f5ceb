"""Opening what the jobs work on: a checkpoint with its architecture, and a base that belongs to it."""

from __future__ import annotations

import os
from pathlib import Path

from unmergeable.architecture import Architecture, detect
from unmergeable.attacks.prepared import in_words_of
from unmergeable.checkpoint.correspondence import corresponding_names
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.parts import common_part, kind_of
from unmergeable.checkpoint.source import RenamedSource, TensorSource, shapes_of
from unmergeable.errors import BadInput, Mismatch

AnyPath = str | os.PathLike[str]
"""A file or folder; where it names a checkpoint also ``hub:OWNER/NAME``."""


def open_with_architecture(
    folder: Path, *, base: Path | None = None, allow_pickle: bool | None = None
) -> tuple[TensorSource, Architecture]:
    """Open a checkpoint (a LoRA folder on ``base``) and find its symmetry map, reading headers only."""
    source = open_checkpoint(folder, base=base, allow_pickle=allow_pickle)
    return source, architecture_of(source)


def architecture_of(source: TensorSource) -> Architecture:
    """The architecture of an open checkpoint; raises UnsupportedArchitecture naming what does not fit."""
    return detect(source.config, shapes_of(source))


def in_words_of_base(base: Path, release: TensorSource, *, allow_pickle: bool | None = None) -> TensorSource:
    """A release as :func:`~unmergeable.attacks.prepared.in_words_of` reads it; as it is where there is no such base."""
    return in_words_of(open_checkpoint(base, allow_pickle=allow_pickle), release) if base.exists() else release


def open_base(
    folder: Path, expert: TensorSource, architecture: Architecture, *, allow_pickle: bool | None = None
) -> TensorSource:
    """Open the base of ``expert``, under the expert's tensor names.

    The body must be the same network: every tensor with a symmetry, of the same shape. Output heads may differ, and
    so may prefixes of names. A whole that holds the expert's network, such as all of CLIP around its vision tower, is
    fine.

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
    if common_part(expert.config, base.config) is None:
        raise Mismatch(
            f"base {folder} is a {kind_of(base.config)} model and {expert.description} a {kind_of(expert.config)}; "
            "give the checkpoint it was fine-tuned from."
        )
    names = corresponding_names(shapes_of(expert), shapes_of(base))
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
