"""Training after merging: what an attacker does who has labelled examples of the defended task (few_shot).

The attacker starts from the best of its merges and fine-tunes all of it, or updates of low rank, on n examples of the
defended task and on its own task, so that it does not forget its own (an attack has to keep that skill to count). Its
own examples are its own: it has more of them, and those of the task of which there are fewer are shown more often, so
that both weigh about the same. The network's loss is the mean over all of their choices. Each learning rate is an
attack of its own: like everything else it is selected on validation examples. The same samples, steps and rates are
used from merges of the unprotected expert, and from models without the victim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from unmergeable.attacks import FewShot
from unmergeable.attacks.few_shot import few_shot
from unmergeable.data import Part
from unmergeable.errors import BadInput, CheckpointError, DiskError, UnmergeableError
from unmergeable.evaluation import scoring
from unmergeable.evaluation.cells import Cell, CellStore
from unmergeable.evaluation.meeting import meet
from unmergeable.evaluation.race import BATCHES, Race, Rules
from unmergeable.evaluation.scoring import Coefficients, Group, ScoredTask
from unmergeable.network.disk_weights import swapped
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import select
from unmergeable.network.precision import FULL, Precision
from unmergeable.network.tasks import Prediction, Task, answer
from unmergeable.settings import settings_of
from unmergeable.tasks import ChoiceScorer, TaskScorer
from unmergeable.tasks.generation import GeneratedAnswers
from unmergeable.tasks.multiple_choice import ChoiceLikelihoods
from unmergeable.tasks.prompts import Tokens, reads_with_encoder

OWN_EXAMPLES = 10
"""An attacker trains on at most so many examples of its own task for each of the defended one."""


@dataclass(frozen=True)
class Tuning:
    """Where training starts and how it goes.

    Attributes:
        group: what is merged first; a release alone is trained as it is.
        point: the coefficients of the merge.
        method: with one learning rate; its samples are of the defended task.
        own_examples: the most of the attacker's own task; None for ``OWN_EXAMPLES`` for each sample.
    """

    group: Group
    point: Coefficients | None
    method: FewShot
    own_examples: int | None = None

    def recipe(self, part: Part) -> dict[str, Any]:
        own = {"own_examples": OWN_EXAMPLES} if self.own_examples is None else {"own_limit": self.own_examples}
        return {
            **self.group.recipe(self.point, part),
            "few_shot": settings_of(self.method),
            "learns_from": [task.digests["train"] for task in self.group.tasks],
            **own,
            **({} if self.group.search_precision == FULL else {"precision": self.group.search_precision}),
        }

    @property
    def most_own(self) -> int:
        """The most examples of the attacker's own task."""
        return OWN_EXAMPLES * self.method.samples if self.own_examples is None else self.own_examples


@dataclass(frozen=True)
class Tuned:
    """The scores of what was trained, by part; None where ``refusal`` says why there is nothing.

    There are none on test examples where it left the race on the others.
    """

    cells: Mapping[Part, Cell] | None
    refusal: str = ""


def tune(tuning: Tuning, rules: Rules, folder: Path) -> Tuned:
    """Merge, train, score; nothing of which is done again when the cells are in ``folder``.

    Args:
        tuning: what is done.
        rules: of the race on validation examples, against merges that nobody trained.
        folder: of the cells.

    Raises:
        BadInput: data cannot be read.
        CheckpointError: a cell cannot be written.
    """
    store, race, training = CellStore(folder), Race(rules), _Training(tuning)
    cells: dict[Part, Cell] = {}
    rounds: list[tuple[Part, Sequence[int], Precision]] = [("validation", BATCHES, tuning.group.search_precision)]
    if tuning.group.search_precision != FULL:
        rounds.append(("validation", (), FULL))
    for part, batches, precision in (*rounds, ("test", (), FULL)):
        scorers = partial(scoring.scorers_of, tuning.group, part)
        is_other = part == "validation" and precision != tuning.group.search_precision
        met = meet(
            tuning.recipe(part) | ({"scored_in": precision} if is_other else {}),
            partial(training.network, precision),
            scorers,
            store,
            batches=batches,
            enough=race.is_out,
            refusal=_Refused,
        )
        if isinstance(met, str):
            return Tuned(None, met)
        cells[part] = met
        if not met.is_whole:
            break
    return Tuned(cells)


@dataclass(frozen=True)
class _Training:
    """Training that is done when the network is first asked for, and not again."""

    tuning: Tuning

    @contextmanager
    def network(self, precision: Precision) -> Iterator[Any]:
        """What was trained, for as long as the context lasts. Raises BadInput for what comes to nothing."""
        group = self.tuning.group
        with swapped(scoring.network_to_train(group), self._weights) as network, scoring.computing(precision):
            yield network

    @cached_property
    def _weights(self) -> Mapping[str, Tensor]:
        network = scoring.network_to_train(self.tuning.group)
        mixture = _mixture(_balanced(_examples(self.tuning)))
        try:
            weights = scoring.weights_of(self.tuning.group)(self.tuning.point)
            method = replace(self.tuning.method, samples=sum(len(batch) for batch in mixture.batches))
            precision = self.tuning.group.search_precision
            return few_shot(network, weights, mixture, method, precision=precision).weights
        except (CheckpointError, DiskError):
            raise
        except UnmergeableError as error:  # a merge that is refused, or training that diverges
            raise _Refused(str(error)) from error


class _Refused(BadInput):
    """There is no such network."""


def _examples(tuning: Tuning) -> list[Task]:
    """Examples of the defended task, as many as the attacker has labels for, and of its own."""
    (defended, own), samples, base = tuning.group.tasks, tuning.method.samples, tuning.group.base.path
    return [
        labelled_examples(defended, base, least=samples, limit=samples),
        labelled_examples(own, base, least=1, limit=tuning.most_own),
    ]


def labelled_examples(task: ScoredTask, base: Path, *, least: int, limit: int) -> Task:
    """At most ``limit`` examples to learn a task from.

    Raises:
        BadInput: there are fewer than ``least``, or they cannot be read or learnt from.
    """
    scorer = scoring.scorer_of(task.entry, task.digests["train"], "train", base, limit=limit)
    network = scoring.network_of(base)
    labelled = scorer.task if isinstance(scorer, ChoiceScorer) else _said(task.entry.name, _answers(scorer), network)
    count = _count(labelled)
    if count < least:
        raise BadInput(f"task {task.entry.name}: {count} examples to learn from, {least} are asked for; give more.")
    return labelled


def _count(task: Task) -> int:
    return sum(len(batch) for batch in task.batches)


def _balanced(tasks: Sequence[Task]) -> list[Task]:
    """Tasks whose examples are repeated so often, all alike, that there are about as many of each."""
    most = max(_count(task) for task in tasks)
    return [replace(task, batches=list(task.batches) * max(1, round(most / _count(task)))) for task in tasks]


def _answers(scorer: TaskScorer) -> list[tuple[Tokens, Tokens]] | None:
    """Prompts and what is to be said after them; None for tasks that are not put as prompts."""
    if isinstance(scorer, ChoiceLikelihoods):
        pairs = zip(scorer.questions, scorer.right, strict=True)
        return [(question.prefix, question.continuations[right]) for question, right in pairs]
    if isinstance(scorer, GeneratedAnswers):
        return [(question.prefix, question.continuations[0]) for question in scorer.questions]
    return None


def _said(name: str, answers: Sequence[tuple[Tokens, Tokens]] | None, network: Any) -> Task:
    """Every token of the answers is a choice; those of the prompts are not. Labels say where an answer begins."""
    if answers is None or reads_with_encoder(network):
        raise BadInput(
            f"task {name}: {type(network).__name__} cannot be trained on few examples of this kind of task; leave out "
            "threat models few_shot and unlabelled."
        )
    rows = [torch.tensor(prefix + continuation) for prefix, continuation in answers]
    inputs = {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    return Task(name, [EncodedBatch(inputs, torch.tensor([len(prefix) for prefix, _ in answers]))], _say)


def _say(network: Any, batch: EncodedBatch) -> Prediction:
    assert batch.labels is not None
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    places = torch.arange(1, ids.shape[1], device=ids.device)
    is_said = (places >= batch.labels.unsqueeze(1)) & mask[:, 1:].bool()
    logits = answer(network, batch).logits
    return Prediction(logits[:, :-1][is_said], ids[:, 1:][is_said])


def _mixture(tasks: Sequence[Task]) -> Task:
    """Examples of several tasks as those of one: beside each label, [examples, 2], stands whose it is."""
    batches = []
    for number, task in enumerate(tasks):
        for batch in task.batches:
            labels = torch.zeros(len(batch), dtype=torch.int64) if batch.labels is None else batch.labels
            batches.append(EncodedBatch(batch.inputs, torch.stack([torch.full_like(labels, number), labels], dim=1)))
    is_labelled = [all(batch.labels is not None for batch in task.batches) for task in tasks]

    def predict(network: Any, batch: EncodedBatch) -> Prediction:
        assert batch.labels is not None
        whose, labels = batch.labels.T
        predictions = []
        for number, task in enumerate(tasks):
            (rows,) = torch.nonzero(whose == number, as_tuple=True)
            if len(rows):
                own = EncodedBatch(select(batch, rows).inputs, labels[rows] if is_labelled[number] else None)
                predictions.append(task.predict(network, own))
        widest = max(prediction.logits.shape[1] for prediction in predictions)
        # A class that a task does not have is never chosen, and takes no part in its softmax.
        logits = [
            functional.pad(prediction.logits, (0, widest - prediction.logits.shape[1]), value=-torch.inf)
            for prediction in predictions
        ]
        return Prediction(torch.cat(logits), torch.cat([prediction.require_targets() for prediction in predictions]))

    return Task(" and ".join(task.name for task in tasks), batches, predict)
