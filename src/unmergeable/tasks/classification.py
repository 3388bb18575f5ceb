"""``classification``: one class for each image, text or ready input.

The classes are those of the network, of a head beside it (:mod:`unmergeable.tasks.heads`), or names that a CLIP text
tower turns into a zero-shot head. A causal language model without any of these is asked for every next token of a text,
as ``perplexity`` does. The loss is the cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from unmergeable.data import Fields
from unmergeable.errors import UsageError
from unmergeable.network.encoding import EncodedData, Encoder
from unmergeable.network.tasks import Task
from unmergeable.tasks.clip_head import clip_head
from unmergeable.tasks.credits import ChoiceScorer
from unmergeable.tasks.labelled import LabelledData
from unmergeable.tasks.task_kind import TaskData, TaskKind, TaskScorer


@dataclass(frozen=True)
class Classification(TaskKind):
    """Settings.

    Attributes:
        text, image, label: what these fields are called in the data.
        classes: names of classes for a zero-shot head, made by the CLIP model in the encoder's folder.
        templates: sentences for each class, with ``{}`` where its name goes; their mean direction is the class.
    """

    name: ClassVar[str] = "classification"
    text: str = "text"
    image: str = "image"
    label: str = "label"
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)

    @property
    def fields(self) -> Fields:
        return Fields(self.text, self.image, self.label)

    def scorer(self, data: TaskData, network: Any) -> TaskScorer:
        """Encodes the examples once and keeps them in memory.

        Raises:
            BadInput: the examples or the head cannot be read, or a label is none of the classes.
            UsageError: a head and names of classes are given.
        """
        source = replace(data.source, fields=self.fields)
        if not self.classes:
            labelled = LabelledData(source, data.encoder, data.head)
            return ChoiceScorer(labelled.task(network, data.name, batch_size=data.batch_size))
        if data.head is not None:
            raise UsageError(f"{data.name}: a head and names of classes are given; give one of them.")
        head = clip_head(data.encoder, self.classes, self.templates)
        batches = list(EncodedData(source, Encoder(data.encoder), data.batch_size, self.classes))
        return ChoiceScorer(Task(data.name, batches, head.predict))
