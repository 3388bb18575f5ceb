"""Examples of several tasks as those of one, and answers of language models as choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from unmergeable.attacks import FewShot
from unmergeable.errors import BadInput
from unmergeable.evaluation.cells import Cell, digest_of
from unmergeable.evaluation.plans.audit_plan import parse_plan
from unmergeable.evaluation.plans.entries import MergeEntry
from unmergeable.evaluation.race import BATCHES, Rules
from unmergeable.evaluation.scoring import Checkpoint, Group, ScoredTask
from unmergeable.evaluation.tuning import Tuning, _balanced, _mixture, _said, tune
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import Prediction, Task
from zoo import TOYS, load_toy, write_toy


def head_task(name: str, head: nn.Linear, examples: int, seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(examples, 6, generator=generator)
    labels = torch.randint(head.out_features, (examples,), generator=generator)

    def predict(network: Any, batch: EncodedBatch) -> Prediction:
        return Prediction(head(network(batch.inputs["features"])), batch.labels)

    return Task(name, [EncodedBatch({"features": features}, labels)], predict)


def test_a_mixture_is_each_task_by_its_own_head() -> None:
    """Heads of 3 and 5 classes; the loss and its gradient are those of both tasks, weighted by their examples."""
    torch.manual_seed(0)
    network = nn.Linear(6, 6)
    tasks = [head_task("a", nn.Linear(6, 3), 4, seed=1), head_task("b", nn.Linear(6, 5), 8, seed=2)]
    whole = _mixture(tasks)
    assert whole.name == "a and b"
    labels = torch.cat([batch.labels for batch in whole.batches if batch.labels is not None])
    features = torch.cat([batch.inputs["features"] for batch in whole.batches])
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(3))

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        network.zero_grad()
        loss.backward()
        assert network.weight.grad is not None
        return network.weight.grad.clone()

    mixed = whole.predict(network, EncodedBatch({"features": features[shuffled]}, labels[shuffled]))
    found = gradient(functional.cross_entropy(mixed.logits, mixed.require_targets()))
    alone = []
    for task in tasks:
        (batch,) = task.batches
        prediction = task.predict(network, batch)
        alone.append(functional.cross_entropy(prediction.logits, prediction.require_targets(), reduction="sum"))
    expected = gradient((alone[0] + alone[1]) / 12)
    # Sums of twelve terms in another order.
    assert torch.allclose(found, expected, rtol=0, atol=12 * 2.0**-24 * float(expected.abs().max()) * 6)
    assert not torch.allclose(found, gradient_of_first(network, tasks[0]), atol=1e-3), "control: both count"


@pytest.mark.parametrize(("few", "many", "repeated"), [(4, 40, 40), (4, 4, 4), (4, 11, 12), (10, 4, 8)])
def test_both_tasks_weigh_about_the_same(few: int, many: int, repeated: int) -> None:
    tasks = [head_task("defended", nn.Linear(6, 3), few, seed=1), head_task("own", nn.Linear(6, 5), many, seed=2)]
    found = [sum(len(batch) for batch in task.batches) for task in _balanced(tasks)]
    assert found == ([repeated, many] if few <= many else [few, repeated])


def gradient_of_first(network: nn.Linear, task: Task) -> torch.Tensor:
    network.zero_grad()
    (batch,) = task.batches
    prediction = task.predict(network, batch)
    functional.cross_entropy(prediction.logits, prediction.require_targets()).backward()
    assert network.weight.grad is not None
    return network.weight.grad


def test_only_answers_are_choices(tmp_path: Path) -> None:
    toy = TOYS["llama"]
    write_toy(toy, tmp_path / "toy")
    network = load_toy(tmp_path / "toy", toy)
    answers = [((5, 6, 7), (8, 9)), ((10,), (11,))]
    task = _said("questions", answers, network)
    (batch,) = task.batches
    prediction = task.predict(network, batch)
    assert prediction.require_targets().tolist() == [8, 9, 11]
    with torch.no_grad():
        alone = network(input_ids=torch.tensor([[10, 11]])).logits[0, 0]
    # Padding on the right is behind everything a causal model looks at.
    assert torch.allclose(prediction.logits[2], alone, rtol=0, atol=64 * 2.0**-24 * float(alone.abs().max()))
    with pytest.raises(BadInput, match="leave out threat models few_shot and unlabelled"):
        _said("pictures", None, network)


@pytest.fixture
def tuning(workshop: Path, whole_plan: dict[str, Any]) -> Tuning:
    """A merge of the workshop that is trained for a moment."""
    tasks = [{**task, "train": f"{task['name'].removesuffix('-task')}-train.npz"} for task in whole_plan["tasks"]]
    plan = parse_plan({**whole_plan, "tasks": tasks}, workshop)
    digests = {path: digest_of(path) for path in plan.paths}
    base, mine, theirs = (Checkpoint(workshop / name, digests[workshop / name]) for name in ("base", "mine", "theirs"))
    scored = tuple(ScoredTask.of(task, digests) for task in plan.tasks)
    group = Group(base, (mine, theirs), MergeEntry("task_arithmetic", "task_arithmetic", {}), scored)
    return Tuning(group, (0.65, 1.0), FewShot(samples=8, steps=1, learning_rates="1e-6"))


def test_training_that_cannot_be_the_choice_is_not_tested(tuning: Tuning, tmp_path: Path) -> None:
    """Against a rival that is right throughout it leaves, and is not trained again to find that out; alone it stays."""
    images = tuning.group.tasks[0].entry.size("validation")
    right = np.ones(images)
    rival = Cell({}, {"mine-task": right, "theirs-task": right}, 0.0)
    rules = Rules("mine-task", "theirs-task", right, (rival,), possible=1)
    left = tune(tuning, rules, tmp_path).cells
    assert left is not None
    assert set(left) == {"validation"}
    assert left["validation"].met in BATCHES
    assert not left["validation"].is_whole
    again = tune(tuning, rules, tmp_path).cells
    assert again is not None
    assert again["validation"].cpu_seconds == left["validation"].cpu_seconds
    own = right * 0  # a free-rider's model that is never right: every attack keeps its skill
    stayed = tune(tuning, Rules("mine-task", "theirs-task", own, (), possible=1), tmp_path).cells
    assert stayed is not None
    assert {part: len(cell.credits["mine-task"]) for part, cell in stayed.items()} == {
        "validation": images,
        "test": images,
    }
    met = left["validation"].met
    assert (stayed["validation"].credits["mine-task"][:met] == left["validation"].credits["mine-task"]).all()
