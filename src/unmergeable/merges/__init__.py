"""Merges: one file per method, and the engine that runs any of them on files or in memory."""

from unmergeable.merges.engine import merge, merge_state_dicts
from unmergeable.merges.linear import Linear
from unmergeable.merges.method import Merge
from unmergeable.merges.task_arithmetic import TaskArithmetic
from unmergeable.merges.ties import Ties

MERGES: dict[str, type[Merge]] = {Linear.name: Linear, TaskArithmetic.name: TaskArithmetic, Ties.name: Ties}
"""Every merge method by the name it has on the command line."""

__all__ = ["MERGES", "Linear", "Merge", "TaskArithmetic", "Ties", "merge", "merge_state_dicts"]
