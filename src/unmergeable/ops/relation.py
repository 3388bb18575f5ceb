"""Whether a checkpoint can be the base of another: one look at a few of their tensors.

A fine-tune keeps the direction of its base's matrices: their cosine is above 0.9 after any training that people do.
Matrices of models that were trained apart are as good as orthogonal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.slices import sample
from unmergeable.checkpoint.source import StoredSource, TensorSource

MATRICES = 8
"""How many are looked at. A protection of attention leaves the others of an earlier release as they are."""

NUMBERS = 1 << 20
"""How many of each. The cosine of as many that were drawn apart is about 0.001, far below what is refused."""

SMALLEST_COSINE = 0.3
"""Of the matrix that agrees best. Of n numbers drawn apart the cosine is about 1 / sqrt(n)."""

_LEAST_NUMBERS = 256  # of fewer numbers, those of two models may agree by chance
_LEFT_BY_TRAINING = ("training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt")
_BASE_MODEL = re.compile(r"^base_model:\s*[\"']?([^\s\"']+)", re.MULTILINE)


def look_at_base(base: TensorSource, expert: TensorSource) -> tuple[str, ...]:
    """Look at a base that the expert may not have been fine-tuned from.

    Returns:
        What the owner should look at, in sentences: that no weights resemble each other, that all are the same, or
        signs that the two were exchanged.
    """
    names = [name for name in expert.names if _is_comparable(expert, base, name)]
    step = max(1, len(names) // MATRICES)
    looked_at = names[::step][:MATRICES]
    cosines = [_cosine(sample(expert, name, NUMBERS), sample(base, name, NUMBERS)) for name in looked_at]
    if cosines and max(cosines) < SMALLEST_COSINE:
        return (
            f"Warning: {expert.description} does not look like a fine-tune of base {base.description}: of "
            f"{len(cosines)} matrices none resembles its counterpart (largest cosine {max(cosines):.2f}); give the "
            "checkpoint it was fine-tuned from.",
        )
    if all(cosine > 1 - 1e-6 for cosine in cosines) and _are_equal(expert, base):
        return (
            f"Warning: {expert.description} and base {base.description} hold the same weights: there is no fine-tune "
            "to protect; give the fine-tune, and as base the checkpoint it was fine-tuned from.",
        )
    return tuple(_signs_of_exchange(base.folder, expert.folder))


def _is_comparable(expert: TensorSource, base: TensorSource, name: str) -> bool:
    if name not in base.index.entries and name not in base.names:
        return False
    ours, theirs = expert.spec(name), base.spec(name)
    is_matrix = len(ours.shape) > 1 and ours.numel >= _LEAST_NUMBERS and torch_dtype(ours.dtype).is_floating_point
    return is_matrix and ours.shape == theirs.shape


def _cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    first, second = first.float(), second.float()
    scale = torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)
    return float(first @ second / scale) if scale > 0 else 0.0


def _are_equal(expert: TensorSource, base: TensorSource) -> bool:
    """Whether every tensor is equal; what an adapter leaves alone is the base's without being read."""
    held = set(base.names)
    if held != set(expert.names):
        return False
    return all(expert.spec(name) == base.spec(name) and _is_same(expert, base, name) for name in expert.names)


def _is_same(expert: TensorSource, base: TensorSource, name: str) -> bool:
    if isinstance(expert, StoredSource) and isinstance(base, StoredSource):
        ours, theirs = expert.stored(name), base.stored(name)
        if ours is not None and ours == theirs:
            return True
    return torch.equal(expert.tensor(name), base.tensor(name))


def _signs_of_exchange(base: Path, expert: Path) -> Iterator[str]:
    left = [name for name in _LEFT_BY_TRAINING if (base / name).exists() and not (expert / name).exists()]
    if left:
        yield (
            f"Warning: {base} was given as the base and holds {left[0]}, which training leaves: look whether it is the "
            "fine-tune, and the two were exchanged."
        )
    named = _named_base(base)
    if named and named.rstrip("/").rpartition("/")[2] == expert.name:
        yield (
            f"Warning: the card of {base}, which was given as the base, says that it was made from {named}: look "
            "whether the two were exchanged."
        )


def _named_base(folder: Path) -> str | None:
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:10_000]
    except OSError:
        return None
    head = card.split("---")[1] if card.startswith("---") and card.count("---") > 1 else ""
    found = _BASE_MODEL.search(head)
    return found[1] if found else None
