"""What one merge of a table scores: a group of checkpoints and a merge go in, a cell or a refusal comes out.

Networks, state dicts and examples stay in the worker's memory (:mod:`unmergeable.evaluation.scoring`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unmergeable.evaluation.cells import Cell, CellStore
from unmergeable.evaluation.models import ModelMaker, Variant
from unmergeable.evaluation.plan import ProtectionEntry, RecoveryEntry
from unmergeable.evaluation.scoring import Checkpoint, ScoredTask, alone, network_of, score_network, scorer_of, state_of
from unmergeable.evaluation.table_plan import TableMerge
from unmergeable.merges import MERGES, merge_state_dicts
from unmergeable.network.disk_weights import swapped
from unmergeable.settings import configure


@dataclass(frozen=True)
class Group:
    """Checkpoints that become one model, and the tasks it is scored on.

    Attributes:
        models: the victim, and then its partners.
        merge: None to score the only model as it is.
    """

    base: Checkpoint
    models: tuple[Checkpoint, ...]
    merge: TableMerge | None
    tasks: tuple[ScoredTask, ...]

    def recipe(self) -> dict[str, Any]:
        """What the cell depends on."""
        found: dict[str, Any] = {
            "models": [model.digest for model in self.models],
            "tasks": [[task.entry.name, task.digests["test"], task.entry.size("test")] for task in self.tasks],
            "part": "test",
        }
        if self.merge is not None:
            found |= {
                "base": self.base.digest,
                "merge": [self.merge.method, dict(self.merge.settings)],
                "coefficient": self.merge.coefficient,
            }
        return found

    def network(self) -> AbstractContextManager[Any]:
        """The live model, for as long as the context lasts. Raises BadInput when the checkpoints do not merge."""
        if self.merge is None:
            return alone(self.base.path, self.models[0])
        base, experts = state_of(self.base), [state_of(model) for model in self.models]
        method = configure(MERGES[self.merge.method], self.merge.settings)
        weights = merge_state_dicts(base, experts, method=method, coefficients=[self.merge.coefficient] * len(experts))
        return swapped(network_of(self.base.path), weights)


def score_group(group: Group, folder: Path) -> Cell | str:
    """The cell of a group, from ``folder`` or computed; or why the group does not merge.

    Raises:
        BadInput: data or checkpoints cannot be read.
        CheckpointError: the cell cannot be written.
    """
    store, recipe = CellStore(folder), group.recipe()
    kept = store.get(recipe)
    if kept is not None:
        return kept
    base = group.base.path
    tasks = {task.entry.name: scorer_of(task.entry, task.digests["test"], "test", base) for task in group.tasks}
    found = score_network(recipe, group.network, tasks)
    if isinstance(found, Cell):
        store.put(found)
    return found


def make_models(
    maker: ModelMaker, protections: Sequence[ProtectionEntry], recoveries: Sequence[RecoveryEntry], seed: int
) -> list[Variant]:
    """One expert as it is, under each protection, and each of these after each recovery.

    Raises:
        NotEquivalent, BadInput, UsageError: from a protection.
        CheckpointError: the disk is full or fails.
    """
    torch.set_num_threads(1)  # a worker has one processor, and sums do not depend on how many workers there are
    found = [maker.unprotected()]
    for entry in protections:
        released = maker.protected(entry, seed)
        found += [released, *(maker.recovered(released, recovery) for recovery in recoveries)]
    return found
