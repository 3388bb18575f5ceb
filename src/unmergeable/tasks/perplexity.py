"""``perplexity``: how well a causal language model predicts every token of a text from those before it.

    loss   = mean over the tokens of -log p(token | those before), in nats; the perplexity of a text is its exponential
    credit = share of the tokens that the model ranks first

A perplexity has no upper end, so it cannot be a credit. The share of right guesses lies between 0 and 1, orders models
much the same way, and is coarser: report the loss beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from unmergeable.data import Fields
from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedData, Encoder
from unmergeable.network.tasks import Task, is_causal_language_model
from unmergeable.tasks.credits import ChoiceScorer
from unmergeable.tasks.task_kind import TaskData, TaskKind, TaskScorer


@dataclass(frozen=True)
class Perplexity(TaskKind):
    """Settings: what the field with the text is called in the data, and after how many tokens a text is cut."""

    name: ClassVar[str] = "perplexity"
    text: str = "text"
    max_length: int = 512

    @property
    def fields(self) -> Fields:
        return Fields(text=self.text)

    def scorer(self, data: TaskData, network: Any) -> TaskScorer:
        """Raises BadInput for a network that is no causal language model, or examples that are no texts."""
        if not is_causal_language_model(network):
            raise BadInput(f"{data.name}: {type(network).__name__} is no causal language model; perplexity needs one.")
        source = replace(data.source, fields=self.fields)
        encoder = Encoder(data.encoder, self.max_length)
        return ChoiceScorer(Task(data.name, list(EncodedData(source, encoder, data.batch_size))))
