"""A task from files: labelled examples, the head that reads a network's features, and who prepares its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.data import DataSource
from unmergeable.network.encoding import EncodedBatch, EncodedData, Encoder, class_names_of
from unmergeable.network.tasks import Task, is_causal_language_model, is_encoder_decoder, predict
from unmergeable.tasks.heads import read_head


@dataclass(frozen=True)
class LabelledData:
    """Where a task lies.

    Attributes:
        source: its examples.
        encoder: the folder whose tokenizer or image processor prepares them.
        head: file of a head (:mod:`unmergeable.tasks.heads`); None for a network that answers by itself.
    """

    source: DataSource
    encoder: Path
    head: Path | None = None

    def task(self, network: Any, name: str, *, batch_size: int) -> Task:
        """The task for a network, encoded once and kept in memory.

        Classes have the names of ``network``, or are numbered as the rows of the head. A language model without a head
        has no classes: it is asked for the next token of every text, or of what its decoder reads.

        Raises:
            BadInput: the examples or the head cannot be read, or a label is none of the classes.
        """
        head = None if self.head is None else read_head(self.head)
        names = [str(number) for number in range(len(head.weight))] if head else _class_names(network)
        batches: list[EncodedBatch] = list(EncodedData(self.source, Encoder(self.encoder), batch_size, names))
        return Task(name, batches, predict if head is None else head.predict)


def _class_names(network: Any) -> list[str] | None:
    is_language_model = is_causal_language_model(network) or is_encoder_decoder(network)
    return None if is_language_model else list(class_names_of(network))
