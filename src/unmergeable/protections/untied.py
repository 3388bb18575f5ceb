"""A checkpoint with tied embeddings, seen as the one that stores its output head apart: the same network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from unmergeable.architecture import Architecture, detect
from unmergeable.architecture.residual import OUTPUT_HEAD
from unmergeable.checkpoint.index import CheckpointIndex, TensorSpec
from unmergeable.checkpoint.source import DerivedSource, TensorSource
from unmergeable.errors import UsageError

UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
"""What the config says of the two."""


@dataclass(frozen=True)
class UntiedSource(DerivedSource):
    """``original`` with an output head of its own, equal to its ``embedding``, and a config that says so."""

    embedding: str

    @property
    def config(self) -> Mapping[str, Any]:
        return {**self.original.config, **UNTIED}

    @property
    def index(self) -> CheckpointIndex:
        index = self.original.index
        head = replace(index.entries[self.embedding], name=OUTPUT_HEAD)
        return replace(index, entries={**index.entries, OUTPUT_HEAD: head})

    @property
    def names(self) -> Sequence[str]:
        return [*self.original.names, OUTPUT_HEAD]

    def spec(self, name: str) -> TensorSpec:
        return self.original.spec(self._stored(name))

    def tensor(self, name: str) -> torch.Tensor:
        return self.original.tensor(self._stored(name))

    def _stored(self, name: str) -> str:
        return self.embedding if name == OUTPUT_HEAD else name


def untied(source: TensorSource, architecture: Architecture) -> tuple[UntiedSource, Architecture]:
    """The source with its output head apart, and its architecture then.

    Raises:
        UsageError: it is stored apart already, or untying would not change what may be done.
    """
    for stream in architecture.residuals:
        # T5 scales what it ties; elsewhere the tied and the untied network are one.
        gains = stream.kind == "rms" and architecture.family != "t5"
        if stream.tied is not None and gains and OUTPUT_HEAD not in source.names:
            apart = UntiedSource(source, stream.tied)
            return apart, detect(apart.config, {name: apart.spec(name).shape for name in apart.names})
    raise UsageError(
        f"untie: {source.description} has no output head to store apart, or gains nothing by it; leave untie off."
    )
