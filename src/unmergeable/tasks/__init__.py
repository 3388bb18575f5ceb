"""What models are scored on: the head that turns features into an answer, and credit example by example."""

from unmergeable.tasks.credits import example_credits
from unmergeable.tasks.heads import FeatureHead, read_head, write_head
from unmergeable.tasks.labelled import LabelledData

__all__ = ["FeatureHead", "LabelledData", "example_credits", "read_head", "write_head"]
