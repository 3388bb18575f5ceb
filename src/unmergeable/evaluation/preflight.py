"""What is looked at before anything is made: every model, every example, every head that a plan names.

Headers of checkpoints are compared here. Examples are encoded, and one of each part is shown to the network, where they
will be scored: in the workers, which keep what they have read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from unmergeable.data import DataSource, Part, class_number
from unmergeable.errors import BadInput, UsageError
from unmergeable.evaluation import scoring
from unmergeable.evaluation.plans.entries import ProtectionEntry
from unmergeable.evaluation.plans.plan import Plan
from unmergeable.evaluation.plans.releases import ReleaseEntry
from unmergeable.evaluation.scoring import Checkpoint, ScoredTask
from unmergeable.evaluation.structure import open_whole, require_base_structure
from unmergeable.evaluation.tuning import labelled_examples
from unmergeable.network.encoding import EncodedData, Encoder
from unmergeable.network.tasks import Task, device_of
from unmergeable.ops.opened import open_base, open_with_architecture
from unmergeable.pools.pool import Call
from unmergeable.tasks import ChoiceScorer, read_head


def require_models(plan: Plan) -> None:
    """Raises BadInput unless experts, and what was got out of releases, can be merged with the base; headers only."""
    for expert in plan.experts:
        with _about(f"expert {expert.name}"):
            source, architecture = open_with_architecture(expert.path, base=plan.base)
            open_base(plan.base, source, architecture)
            require_base_structure(plan.base, expert.path)
    for release in plan.releases:
        with _about(release.name):
            open_whole(release.checkpoint, plan.base)
        if release.recovered is not None:
            with _about(f"{release.name}, recovered"):
                require_base_structure(plan.base, release.recovered)


def data_checks(plan: Plan, digests: Mapping[Path, str], scored: Callable[..., ScoredTask]) -> list[Call]:
    """Calls that look at all examples of a plan; each raises BadInput or UsageError for what cannot be used."""
    calls: list[Call] = []
    for entry in plan.tasks:
        task, labelled = scored(entry), plan.labelled(entry)
        for part in entry.parts:
            if part != "train":
                calls.append((try_task, (task, part, plan.base)))
            elif labelled:
                calls.append((try_learning, (task, labelled, plan.base)))
            elif not entry.is_split:
                calls.append((try_reading, (entry.name, entry.data(part))))
    calls += [(try_owned, (entry, owner.path, plan.base)) for entry, owner in plan.as_released() if entry.data]
    for release in plan.releases:
        calls += [
            (try_task, (task, "test", plan.base, model)) for task, model in [asked(plan, release, digests, scored)]
        ]
    return calls


def asked(
    plan: Plan, release: ReleaseEntry, digests: Mapping[Path, str], scored: Callable[..., ScoredTask]
) -> tuple[ScoredTask, Checkpoint]:
    """The defended task as a release is asked it, and the release."""
    path = release.checkpoint
    task = scored(release.asked(plan.task(plan.defended_task)), prepared_by=release.encoder)
    return task, Checkpoint(path, digests[path], is_foreign=True, trusts_code=release.trust_remote_code)


def try_task(task: ScoredTask, part: Part, base: Path, own: Checkpoint | None = None) -> None:
    """Encode the examples that will be scored, and show the first to the network."""
    with _about(f"task {task.entry.name}, {part}" if own is None else f"{own.path.name}, task {task.entry.name}"):
        scorer = scoring.task_scorer(task, part, base, own)
        if isinstance(scorer, ChoiceScorer):
            _show_one(scorer.task, scoring.network_for(base, own))


def try_learning(task: ScoredTask, least: int, base: Path) -> None:
    """As many labelled examples as somebody learns from."""
    with _about(f"task {task.entry.name}, train"):
        labelled_examples(task, base, least=least, limit=least)


def try_reading(name: str, data: Path) -> None:
    """Examples without labels: one of them."""
    with _about(f"task {name}, train"):
        next(iter(DataSource(data, limit=1)))


def try_owned(entry: ProtectionEntry, expert: Path, base: Path) -> None:
    """The owner's examples for a protection: their labels, where there is a head, and one of each kind encoded."""
    assert entry.data is not None
    with _about(f"protect, {entry.name}"):
        source, encoder = DataSource(entry.data), Encoder(entry.encoder or expert)
        if entry.generic is not None:
            next(iter(EncodedData(DataSource(entry.generic, limit=1), encoder, 1)))
        head = None if entry.head is None else read_head(entry.head)
        if head is None:
            next(iter(EncodedData(replace(source, limit=1), encoder, 1)))
            return
        names = [str(number) for number in range(len(head.weight))]
        for example in source:
            class_number(example, names)
        first = list(EncodedData(replace(source, limit=1), encoder, 1, names))
        _show_one(Task(entry.name, first, head.predict), scoring.network_of(base))


@torch.no_grad()
def _show_one(task: Task, network: object) -> None:
    first = next(next(iter(task.batches)).singles())
    task.predict(network, first.to(device_of(network)))


@contextmanager
def _about(what: str) -> Iterator[None]:
    """Says of what a complaint is."""
    try:
        yield
    except (BadInput, UsageError) as error:
        raise type(error)(f"{what}: {error}") from None
