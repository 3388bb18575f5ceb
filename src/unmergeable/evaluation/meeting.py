"""A network meets examples batch by batch, until there have been enough; what it scored is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from time import thread_time
from typing import Any

from unmergeable.errors import BadInput, CheckpointError
from unmergeable.evaluation.cells import Cell, CellStore
from unmergeable.tasks import TaskScorer

Enough = Callable[[Cell], bool]
"""Whether a cell that is not whole holds as many examples as are needed."""


def never(cell: Cell) -> bool:
    """Every example is needed."""
    return False


def meet(
    recipe: Mapping[str, Any],
    network: Callable[[], AbstractContextManager[Any]],
    scorers: Callable[[], Mapping[str, TaskScorer]],
    store: CellStore,
    *,
    batches: Sequence[int],
    enough: Enough,
    refusal: type[BadInput] = BadInput,
) -> Cell | str:
    """The cell of a recipe, with as many examples as it takes; or why there is no such network.

    Batches end at the same examples whatever is stored and whenever there were enough, so a cell does not depend on how
    often it was gone on with.

    Args:
        recipe: of the cell.
        network: gives the network, which lives as long as its context; not asked when the examples are stored.
        scorers: gives those of all tasks, by their names; the same.
        store: where cells are kept.
        batches: numbers of examples of each task after which there may be enough, ascending.
        enough: asked after each batch but the last.
        refusal: what ``network`` raises when there is no such network; any other error is one of the audit.

    Raises:
        BadInput: a task cannot be read, or the network cannot do it.
        CheckpointError: a checkpoint cannot be read, or the cell cannot be written.
    """
    cell = store.get(recipe) or Cell(recipe, {}, 0.0, is_whole=False)
    for end in batches:
        if end <= cell.met and (met := cell.first(end)) is not cell and enough(met):
            return met
    if cell.is_whole or (cell.met and enough(cell)):
        return cell
    with ExitStack() as stack:
        began = thread_time()
        try:
            live = stack.enter_context(network())
        except CheckpointError:
            raise
        except refusal as error:
            return str(error)
        ready = scorers()
        whole = max(len(scorer) for scorer in ready.values())
        for end in (*(end for end in batches if cell.met < end < whole), whole):
            more = {
                name: _next(scorer, cell.met, end).credits(live)
                for name, scorer in ready.items()
                if len(scorer) > cell.met
            }
            now = thread_time()
            cell = cell.extended(more, now - began, is_whole=end == whole)
            began = now
            if not cell.is_whole and enough(cell):
                break
    store.put(cell)
    return cell


def _next(scorer: TaskScorer, start: int, end: int) -> TaskScorer:
    stop = min(end, len(scorer))
    return scorer if (start, stop) == (0, len(scorer)) else scorer.only(start, stop)
