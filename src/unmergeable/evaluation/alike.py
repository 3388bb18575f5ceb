"""Models that are the same up to rounding, scored once.

Two keys, two exact methods and a planted form all come back to one point next to the base: what nearest_orbit makes of
them differs by roundings. Merging each of them by itself says the same over and over. Models whose weights differ by
less than :data:`SAME` of what the first of them changed in the base are scored as that one; what stands in an audit's
result says as which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput
from unmergeable.evaluation.scoring import Checkpoint
from unmergeable.progress import Progress, silent

if TYPE_CHECKING:
    from unmergeable.evaluation.models import Variant

SAME = 1e-3
"""Frobenius norm of the difference, relative to that of the update: outputs of merges then differ by a thousandth of
what the model changes in them, which answers of a few hundred examples do not show."""

SCORED_AS = "scored_as"
"""Under which name a model's facts say what it was scored as."""


class _Known:
    """A model to score others as: its weights are read where they lie."""

    def __init__(self, checkpoint: Checkpoint, source: TensorSource, label: str, base: TensorSource) -> None:
        self.checkpoint, self.label = checkpoint, label
        self._source = source
        squares = (
            float((source.tensor(name).double() - base.tensor(name).double()).square().sum())
            for name in source.names
            if torch_dtype(source.spec(name).dtype).is_floating_point
        )
        self._most = SAME**2 * sum(squares)

    def is_alike(self, other: TensorSource) -> bool:
        """Stops at the first tensor that is too far, the small ones first: embeddings are often the same in all."""
        away = 0.0
        for name in sorted(self._source.names, key=lambda name: self._source.spec(name).numel):
            away += float((self._source.tensor(name).double() - other.tensor(name).double()).square().sum())
            if not away <= self._most:
                return False
        return True


def scored_once(variants: Sequence[Variant], base: Path, progress: Progress = silent) -> list[Variant]:
    """The same variants, those that are alike with one checkpoint.

    Only models of the base's own tensors and shapes are compared, and none that need code of their own.
    """
    base_source = open_checkpoint(base)
    known: dict[str, _Known] = {}
    found: list[Variant] = []
    for number, variant in enumerate(variants, start=1):
        progress("comparing models", number, len(variants), "models")
        checkpoint = variant.checkpoint
        source = None if checkpoint is None or checkpoint.trusts_code else _comparable(checkpoint, base_source)
        if checkpoint is None or source is None or checkpoint.digest in known:
            found.append(variant)
            continue
        alike = next((one for one in known.values() if one.is_alike(source)), None)
        if alike is None:
            label = variant.label if variant.recovery is None else f"{variant.label}, {variant.recovery}"
            known[checkpoint.digest] = _Known(checkpoint, source, label, base_source)
            found.append(variant)
        else:
            facts = {**variant.facts, SCORED_AS: alike.label}
            found.append(replace(variant, checkpoint=alike.checkpoint, facts=facts))
    return found


def _comparable(checkpoint: Checkpoint, base: TensorSource) -> TensorSource | None:
    try:
        source = open_checkpoint(checkpoint.path)
    except BadInput:
        return None
    there = set(base.names)
    is_like = set(source.names) == there and all(source.spec(name).shape == base.spec(name).shape for name in there)
    return source if is_like else None
