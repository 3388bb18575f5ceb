"""AdaMerging's gradient is the entropy's, and its steps are Adam's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from network.small_classifier import Classifier, make_task
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.merges import AdaMerging
from unmergeable.merges.adamerging import LearntCoefficients, learn_coefficients
from unmergeable.merges.task_vectors import TaskVectors
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import Prediction, Task, entropy

State = dict[str, Tensor]


def weights(seed: int) -> State:
    return {name: tensor.detach().clone() for name, tensor in Classifier(seed).state_dict().items()}


def make_vectors(count: int = 2) -> TaskVectors:
    return TaskVectors.between(weights(0), [weights(number) for number in range(1, count + 1)])


def tasks(count: int = 2) -> list[Task]:
    return [make_task(12, 6, seed=10 + number, labels=False) for number in range(count)]


def by_autograd(vectors: TaskVectors, steps: int, rate: float, *, is_layerwise: bool, start: float) -> Tensor:
    """The same by differentiating through the merge: coefficients [tensors or 1, experts]."""
    network, names = Classifier(), list(vectors.names)
    raw = torch.full((len(names) if is_layerwise else 1, 2), start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=rate)
    for step in range(steps):
        used = raw.clamp(0, 1)
        merged = {
            name: vectors.base[name]
            + sum(used[row if is_layerwise else 0, i] * vectors.vectors[i][name] for i in range(2))
            for row, name in enumerate(names)
        }
        optimizer.zero_grad()
        loss = sum(
            entropy(functional_call(network, merged, (list(task.batches)[step % 2].inputs["features"],)))
            for task in tasks()
        )
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    return raw.detach().clamp(0, 1)


@pytest.mark.parametrize("granularity", ["layer", "task"])
@pytest.mark.parametrize("start", [0.3, 0.999])
def test_equals_automatic_differentiation_through_the_merge(granularity: str, start: float) -> None:
    """In float64; near 1 some coefficients are held at the end of their range."""
    vectors = make_vectors()
    method = AdaMerging(granularity=granularity, steps=7, learning_rate=0.02, start=start)  # type: ignore[arg-type]
    found = learn_coefficients(Classifier(5), vectors, tasks(), method)
    expected = by_autograd(vectors, 7, 0.02, is_layerwise=granularity == "layer", start=start)
    for row, name in enumerate(vectors.names):
        its = expected[row if granularity == "layer" else 0]
        assert torch.allclose(torch.tensor(found.coefficients[name], dtype=torch.float64), its, rtol=0, atol=1e-9)
    assert bool((expected != start).any())  # control: they moved
    if start == 0.999:
        assert bool((expected == 1).any())


def test_lowers_the_entropy_on_its_tasks() -> None:
    observed: list[float] = []

    def observe(step: int, network: Classifier) -> None:
        with torch.no_grad():
            answers = [network(batch.inputs["features"]) for task in tasks() for batch in task.batches]
        observed.append(sum(float(entropy(logits)) for logits in answers))

    network = Classifier(5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = learn_coefficients(
        network, make_vectors(), tasks(), AdaMerging(steps=40, learning_rate=0.02), observe=observe
    )
    assert len(observed) == len(found.entropies) == 40
    assert observed[-1] < 0.9 * observed[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_each_task_keeps_its_head() -> None:
    """A head decides what is seen of the entropy, and has no coefficient."""
    vectors = make_vectors()
    heads = [{name: weights(seed)[name] for name in ("outer.weight", "outer.bias")} for seed in (21, 22)]
    method = AdaMerging(steps=2, learning_rate=0.02)

    def learn(heads: list[State]) -> LearntCoefficients:
        return learn_coefficients(Classifier(), vectors, tasks(), method, heads=heads)

    found = learn(heads)
    assert found.coefficients["outer.weight"] == (0.0, 0.0)
    assert found.coefficients["inner.weight"] != (0.3, 0.3)
    assert learn(heads[::-1]).entropies != found.entropies
    # The first entropies are those of the merged body under each head.
    body = vectors.merged((0.3, 0.3))
    for task, head, seen in zip(tasks(), heads, found.entropies[0], strict=True):
        logits = functional_call(Classifier(), {**body, **head}, (next(iter(task.batches)).inputs["features"],))
        assert seen == pytest.approx(float(entropy(logits)), rel=1e-12)


def test_experts_may_start_apart_and_signs_may_be_elected() -> None:
    method = AdaMerging(steps=1, learning_rate=1e-9, task_vectors="ties", density=0.5)
    seen: list[State] = []
    vectors = make_vectors()

    def observe(step: int, network: Classifier) -> None:
        seen.append({name: tensor.detach().clone() for name, tensor in network.state_dict().items()})

    learn_coefficients(Classifier(), vectors, tasks(), method, start=(0.2, 0.6), observe=observe)
    expected = vectors.elected(0.5).merged((0.2, 0.6))
    assert all(torch.equal(seen[0][name], expected[name]) for name in expected)


def test_refuses() -> None:
    vectors, method = make_vectors(), AdaMerging(steps=2)
    with pytest.raises(UsageError, match="adamerging: 1 tasks for 2 experts"):
        learn_coefficients(Classifier(), vectors, tasks(1), method)
    with pytest.raises(UsageError, match="1 coefficients for 2 experts"):
        learn_coefficients(Classifier(), vectors, tasks(), method, start=[0.3])
    with pytest.raises(UsageError, match=r"the coefficients \(0.3, 1.5\) must start in \[0, 1\]"):
        learn_coefficients(Classifier(), vectors, tasks(), method, start=(0.3, 1.5))
    with pytest.raises(UsageError, match="every tensor belongs to a head"):
        learn_coefficients(Classifier(), vectors, tasks(), method, heads=[weights(1), weights(2)])
    with pytest.raises(UsageError, match="1 heads for 2 experts"):
        learn_coefficients(Classifier(), vectors, tasks(), method, heads=[{}])
    with pytest.raises(Mismatch, match="more: a head's tensor that the base does not hold"):
        learn_coefficients(Classifier(), vectors, tasks(), method, heads=[{"more": torch.zeros(1)}, {}])
    with pytest.raises(BadInput, match="no examples to learn from"):
        learn_coefficients(Classifier(), vectors, [make_task(0, 1), tasks()[0]], method)

    def broken(network: object, batch: EncodedBatch) -> Prediction:
        assert isinstance(network, Classifier)
        return Prediction(network(batch.inputs["features"]) * torch.nan, None)

    with pytest.raises(BadInput, match=r"the entropies are \[nan, .*\] at step 0"):
        learn_coefficients(Classifier(), vectors, [Task("x", tasks()[0].batches, broken), tasks()[1]], method)


def test_the_summary_has_entropies_and_mean_coefficients() -> None:
    learnt = LearntCoefficients({"a": (0.2, 0.4), "b": (0.4, 0.8)}, ((1.0, 2.0), (0.5, 1.0)))
    assert learnt.summary == "Entropy 1.500 -> 0.750 nats; mean coefficients 0.300, 0.600"
