"""The examples an attacker holds: local files, prepared for a network as a task."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmergeable.data import DataSource, Fields
from unmergeable.network.encoding import EncodedData, Encoder
from unmergeable.network.tasks import Task
from unmergeable.tasks import LabelledData

BATCH = 32
"""Examples read at a time; training draws batches of its own from them."""

MAX_LENGTH = 512
"""Tokens after which texts are cut."""


@dataclass(frozen=True)
class Examples:
    """Local examples.

    Attributes:
        path: of the examples (see ``unmergeable.data``).
        encoder: the folder whose tokenizer or image processor prepares them.
        head: file of the task's head; None for a network that answers by itself.
        fields: what text, image and label are called in the data.
    """

    path: Path
    encoder: Path
    head: Path | None = None
    fields: Fields = field(default_factory=Fields)

    def unlabelled(self, *, examples: int, seed: int, max_length: int = MAX_LENGTH) -> Task:
        """At most that many examples, drawn by ``seed``, for their inputs alone; texts are cut after ``max_length``."""
        source = DataSource(self.path, fields=self.fields, seed=seed, limit=examples)
        return Task(str(self.path), EncodedData(source, Encoder(self.encoder, max_length), BATCH))

    def labelled(self, network: Any, *, samples: int, seed: int) -> Task:
        """That many labelled examples, drawn by ``seed``; texts alone for a causal language model without a head."""
        source = DataSource(self.path, fields=self.fields, seed=seed, limit=samples)
        return LabelledData(source, self.encoder, self.head).task(network, str(self.path), batch_size=BATCH)
