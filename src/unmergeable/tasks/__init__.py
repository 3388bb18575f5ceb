"""What models are scored on: one file for each kind of task, and credit example by example."""

from unmergeable.tasks.classification import Classification
from unmergeable.tasks.clip_head import clip_head
from unmergeable.tasks.credits import ChoiceScorer, example_credits, example_losses
from unmergeable.tasks.generation import Generation
from unmergeable.tasks.heads import FeatureHead, read_head, write_head
from unmergeable.tasks.judge import Judge
from unmergeable.tasks.labelled import LabelledData
from unmergeable.tasks.lm_eval import HarnessTask
from unmergeable.tasks.multiple_choice import MultipleChoice
from unmergeable.tasks.perplexity import Perplexity
from unmergeable.tasks.task_kind import Scores, TaskData, TaskKind, TaskScorer
from unmergeable.tasks.text_to_image import TextToImage

__all__ = [
    "TASKS",
    "ChoiceScorer",
    "Classification",
    "FeatureHead",
    "Generation",
    "HarnessTask",
    "Judge",
    "LabelledData",
    "MultipleChoice",
    "Perplexity",
    "Scores",
    "TaskData",
    "TaskKind",
    "TaskScorer",
    "TextToImage",
    "clip_head",
    "example_credits",
    "example_losses",
    "read_head",
    "write_head",
]

TASKS: dict[str, type[TaskKind]] = {
    cls.name: cls for cls in (Classification, MultipleChoice, Generation, Perplexity, TextToImage, Judge, HarnessTask)
}
