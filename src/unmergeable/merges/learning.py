"""What merges that learn from data share: the examples of each expert, a live network, statistics in files.

Such a merge reads its data first, with a live network; what it learnt is then written like any other merge, streamed.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from unmergeable.checkpoint import scratch
from unmergeable.checkpoint.disk import writing
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.finite import require_finite
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.partial import require_absent, require_creatable
from unmergeable.checkpoint.source import TensorSource, require_same_tensors
from unmergeable.data import DataSource
from unmergeable.errors import Mismatch, UsageError
from unmergeable.merges.base import Inputs, Merge
from unmergeable.merges.models import Model, source_model
from unmergeable.merges.variation import Vary
from unmergeable.network.disk_weights import find_places, swapped
from unmergeable.network.encoding import EncodedData, Encoder, class_names_of, ordered_names
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task, is_causal_language_model
from unmergeable.progress import Progress
from unmergeable.registry import Requirements

_STATISTICS = ".statistics"
"""Says that a folder of statistics is a merge's own, and may be removed by the next one."""

BATCH_SIZE = 8
"""Of examples that statistics are taken of."""


@dataclass(frozen=True)
class LearntMerge:
    """A merge with all that it needs to be written.

    Attributes:
        facts: what was learnt, for the record; None where data had no part.
        summary: the same in a line for a terminal, or nothing.
    """

    method: Merge
    coefficients: tuple[float | None, ...]
    vary: Vary | None = None
    facts: Mapping[str, Any] | None = None
    summary: str = ""


@dataclass(frozen=True)
class LearningInputs:
    """What a merge learns from.

    Attributes:
        data: files or folders of examples, in the order of the experts.
        template: the folder whose configuration, tokenizer and image processor are used.
        out: the folder that will be written; what is learnt may lie beside it meanwhile.
    """

    base: TensorSource | None
    experts: tuple[TensorSource, ...]
    coefficients: tuple[float | None, ...]
    data: tuple[Path, ...]
    template: Path
    out: Path
    progress: Progress

    @cached_property
    def network(self) -> Any:
        return load_network(self.template)

    @cached_property
    def used_names(self) -> frozenset[str]:
        """The tensors that the network has; loading passes over the rest, masks and the like of older checkpoints."""
        return frozenset(find_places(self.network))

    @property
    def facts(self) -> dict[str, Any]:
        """What was read, for the record."""
        return {"data": [str(path) for path in self.data]}

    def require_data_for_each(self, method: Merge) -> None:
        """Raise UsageError unless there is one data set for each expert."""
        if len(self.data) != len(self.experts):
            raise UsageError(
                f"{method.name}: {len(self.experts)} experts and data of {len(self.data)}; give --data once for each "
                "expert, in their order."
            )

    def state(self, source: TensorSource) -> dict[str, Tensor]:
        """The tensors of a checkpoint that the network has."""
        return {name: source.tensor(name) for name in source.names if name in self.used_names}

    def task(self, number: int, *, batch_size: int, examples: int, seed: int, is_labelled: bool = False) -> Task:
        """One data set as a task. Classes have the names they have in the configuration of the expert it belongs to."""
        names = None
        if is_labelled and not is_causal_language_model(self.network):
            # Of a soup, whose experts share a task, there may be more data than experts.
            named = self.experts[min(number, len(self.experts) - 1)].config.get("id2label")
            names = ordered_names(named) if named else class_names_of(self.network)
        source = DataSource(self.data[number], seed=seed, limit=examples)
        return Task(str(source.path), EncodedData(source, Encoder(self.template), batch_size, names))

    def tasks(self, *, batch_size: int, examples: int, seed: int, is_labelled: bool = False) -> list[Task]:
        """Every data set as a task, in their order."""
        return [
            self.task(number, batch_size=batch_size, examples=examples, seed=seed, is_labelled=is_labelled)
            for number in range(len(self.data))
        ]


@dataclass(frozen=True)
class StatisticsMerge(Merge, ABC):
    """A merge that weighs experts by what is known of their data: statistics in files, in memory, or from data.

    ``statistics`` is a folder with a subfolder for each expert, ``1``, ``2``, ….
    """

    needs_positive: ClassVar[bool] = True

    statistics: str = ""

    def requirements(self) -> Requirements:
        return Requirements(needs=() if self.statistics else ("data",), accepts=("statistics",))

    @contextmanager
    def learn(self, inputs: LearningInputs) -> Iterator[LearntMerge]:
        inputs.require_data_for_each(self)
        if self.statistics:
            raise UsageError(f"{self.name}: give either data or statistics, not both.")
        with gathered_statistics(inputs, self.gather) as folder:
            yield LearntMerge(replace(self, statistics=str(folder)), inputs.coefficients, facts=inputs.facts)

    @abstractmethod
    def gather(self, inputs: LearningInputs, number: int, folder: Path) -> str:
        """Write the statistics of one expert, whose weights the network has, to ``folder``; returns their hash."""

    def statistics_of(self, inputs: Inputs) -> Sequence[Model]:
        """The statistics of each expert; empty where none were given."""
        if inputs.statistics or not self.statistics:
            return inputs.statistics
        return open_statistics(self.statistics, len(inputs.operands(inputs.names[0])))


@contextmanager
def learnt_from_data(
    method: Merge,
    base: TensorSource | None,
    experts: Sequence[tuple[TensorSource, float | None]],
    data: Sequence[Path],
    *,
    out: Path,
    progress: Progress,
) -> Iterator[LearntMerge]:
    """The merge to be written inside; files made for it are gone outside.

    Raises:
        UsageError: data for a method that takes none, none for one that needs them, or not one for each expert.
        BadInput: the data cannot be used, or ``out`` exists.
        Mismatch: the experts are not of one architecture.
    """
    sources, coefficients = tuple(source for source, _ in experts), tuple(value for _, value in experts)
    if not data and not method.needs_data:
        yield LearntMerge(method, coefficients)
        return
    method.validate()
    method.require_count(len(sources))
    method.resolve(coefficients)
    require_creatable(out, _STATISTICS)
    require_absent(out)
    template = sources[0] if base is None else base
    for number, source in enumerate(sources, start=1):
        require_same_tensors(template, source, f"expert {number}")
    labelled = {f"expert {number} ({source.description})": source for number, source in enumerate(sources, start=1)}
    require_finite(labelled if base is None else {f"base ({base.description})": base, **labelled}, progress=progress)
    inputs = LearningInputs(base, sources, coefficients, tuple(data), template.folder, out, progress)
    with method.learn(inputs) as learnt:
        yield learnt


@contextmanager
def gathered_statistics(inputs: LearningInputs, write: Callable[[LearningInputs, int, Path], str]) -> Iterator[Path]:
    """A folder with the statistics of every expert, in one beside OUT that is removed at the end.

    Its name is a hash of what it holds. A merge that was killed goes on where it was only for the same settings, and so
    for the same statistics.

    Args:
        inputs: of the merge.
        write: as :meth:`StatisticsMerge.gather`.
    """
    place = inputs.out.with_name(inputs.out.name + _STATISTICS)
    network = inputs.network
    with scratch.begun(place, _STATISTICS):
        try:
            gathered = place / "gathered"
            scratch.empty(place)  # left by a merge that was killed
            with writing(gathered):
                gathered.mkdir()
            digest = hashlib.sha256()
            for number, expert in enumerate(inputs.experts):
                with swapped(network, inputs.state(expert)):
                    digest.update(write(inputs, number, gathered / str(number + 1)).encode())
            named = place / digest.hexdigest()
            with writing(named):
                gathered.rename(named)
            yield named
        finally:
            scratch.remove(place)


def open_statistics(folder: str, experts: int) -> list[Model]:
    """The statistics of each expert, from the subfolders ``1``, ``2``, ….

    Raises:
        CheckpointError: one of them is missing or cannot be read.
        Mismatch: there are more of them than experts.
    """
    if (Path(folder) / str(experts + 1)).exists():
        raise Mismatch(f"{folder}: statistics of more than {experts} experts; they belong to another merge.")
    return [
        source_model(f"statistics {number}", open_checkpoint(Path(folder) / str(number)))
        for number in range(1, experts + 1)
    ]


def floating_shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that are merged, by name."""
    specs = {name: source.spec(name) for name in source.names}
    return {name: tuple(spec.shape) for name, spec in specs.items() if torch_dtype(spec.dtype).is_floating_point}


def require_examples(examples: int) -> None:
    """Raise UsageError unless at least one example may be read."""
    if examples < 1:
        raise UsageError(f"examples={examples}: at least one is needed.")
