"""``adarank`` drops singular components as automatic differentiation says, and writes what it learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from merges.small_models import State, make_models, write_checkpoint
from network.small_classifier import Classifier, make_task
from unmergeable import merges
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.merges import AdaRank, TaskArithmetic, merge, merge_state_dicts
from unmergeable.merges.adarank import MARGIN, LearntMasks, learn_masks
from unmergeable.merges.task_vectors import TaskVectors
from unmergeable.network.tasks import Task, entropy

LAYERS = ("inner.weight", "outer.weight")
FAST = AdaRank(steps=9, learning_rate=0.02)
"""A margin is used up after five steps."""


def weights(seed: int) -> State:
    return {name: tensor.detach().clone() for name, tensor in Classifier(seed).state_dict().items()}


def make_vectors(count: int = 2) -> TaskVectors:
    return TaskVectors.between(weights(0), [weights(number) for number in range(1, count + 1)])


def tasks(count: int = 2) -> list[Task]:
    return [make_task(12, 6, seed=10 + number, labels=False) for number in range(count)]


def by_autograd(vectors: TaskVectors, method: AdaRank, start: float) -> tuple[Tensor, dict[str, Tensor], State]:
    """Through a graph of the merge, as the authors write it: coefficients [tensors, 2], margins, and the merge."""
    network, names = Classifier(), list(vectors.names)
    parts = {name: [torch.linalg.svd(v[name], full_matrices=False) for v in vectors.vectors] for name in LAYERS}
    coefficients = torch.full((len(names), 2), start, dtype=torch.float64, requires_grad=True)
    margins = {}
    for name in LAYERS:
        size = len(parts[name][0][1])
        kept = int(method.density * size)
        margins[name] = torch.tensor([[MARGIN] * kept + [-MARGIN] * (size - kept)] * 2, dtype=torch.float64)
        margins[name].requires_grad_()
    optimizer = torch.optim.Adam([coefficients, *margins.values()], lr=method.learning_rate)

    def merged() -> State:
        found = {}
        for row, name in enumerate(names):
            total = vectors.base[name]
            for expert in range(2):
                own = vectors.vectors[expert][name]
                if name in margins:
                    soft = torch.sigmoid(margins[name][expert] / method.temperature)
                    kept = soft + ((soft > 0.5).double() - soft).detach()
                    left, values, right = parts[name][expert]
                    own = (left * (kept * values)) @ right
                total = total + coefficients[row, expert] * own
            found[name] = total
        return found

    for step in range(method.steps):
        optimizer.zero_grad()
        at_step = merged()
        loss = sum(
            entropy(functional_call(network, at_step, (list(task.batches)[step % 2].inputs["features"],)))
            for task in tasks()
        )
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    with torch.no_grad():
        return coefficients.detach(), {name: margin.detach() for name, margin in margins.items()}, merged()


@pytest.mark.parametrize("start", [0.3, 0.99])
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_equals_automatic_differentiation_through_the_merge(density: float, start: float) -> None:
    """In float64. Coefficients are held nowhere, unlike AdaMerging's."""
    vectors = make_vectors()
    method = AdaRank(density=density, start=start, steps=FAST.steps, learning_rate=FAST.learning_rate)
    found = learn_masks(Classifier(5), vectors, tasks(), method)
    coefficients, margins, _ = by_autograd(vectors, method, start)
    for row, name in enumerate(vectors.names):
        assert torch.allclose(
            torch.tensor(found.coefficients[name], dtype=torch.float64), coefficients[row], rtol=0, atol=1e-9
        )
    for name in LAYERS:
        for expert in range(2):
            assert torch.equal(found.masks[expert][name].bool(), margins[name][expert] > 0)
    joined = torch.cat([mask[name] for mask in found.masks for name in LAYERS])
    assert 0 < int(joined.sum()) < len(joined)  # controls: some are dropped, and coefficients moved
    assert bool((coefficients != start).any())
    if density < 1:  # control: some came back
        begun = torch.cat(
            [(torch.arange(len(mask[name])) < len(mask[name]) // 2) for mask in found.masks for name in LAYERS]
        )
        assert bool((joined.bool() & ~begun).any())


def test_the_merge_is_what_was_learnt() -> None:
    vectors = make_vectors()
    network = Classifier(5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    merged = merges.adarank(
        weights(0), [weights(1), weights(2)], network=network, tasks=tasks(), steps=FAST.steps, learning_rate=0.02
    )
    _, margins, expected = by_autograd(vectors, FAST, 0.3)
    for name in expected:
        assert torch.allclose(merged[name], expected[name], rtol=0, atol=1e-9), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    # Control: with the components that were dropped it would be another merge.
    learnt = learn_masks(network, vectors, tasks(), FAST)
    whole = vectors.merged(learnt.coefficients.__getitem__)
    assert not all(torch.allclose(whole[name], expected[name], rtol=0, atol=1e-3) for name in LAYERS)
    assert any(bool((margin <= 0).any()) for margin in margins.values())


def test_lowers_the_entropy_on_its_tasks() -> None:
    def last(found: tuple[tuple[float, ...], ...]) -> float:
        return sum(map(sum, found[-2:]))  # a step sees one of two batches of each task

    vectors = make_vectors()
    learnt = learn_masks(Classifier(5), vectors, tasks(), AdaRank(steps=60, learning_rate=0.02))
    assert len(learnt.entropies) == 60
    assert last(learnt.entropies) < 0.9 * sum(map(sum, learnt.entropies[:2]))


def test_each_task_keeps_its_head() -> None:
    vectors = make_vectors()
    heads = [{name: weights(seed)[name] for name in ("outer.weight", "outer.bias")} for seed in (21, 22)]
    found = learn_masks(Classifier(), vectors, tasks(), FAST, heads=heads)
    assert set(found.masks[0]) == {"inner.weight"}
    assert found.coefficients["outer.weight"] == (0.0, 0.0)
    assert learn_masks(Classifier(), vectors, tasks(), FAST, heads=heads[::-1]).entropies != found.entropies


def test_files_and_memory_give_the_same_bits(tmp_path: Path) -> None:
    """Statistics are the masks: in a folder, or as they are."""
    base, experts = make_models(2, torch.bfloat16, task_size=0.1)
    masks = []
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        masks.append({name: torch.rand(size, generator=generator).round() for name, size in (("layers.0.weight", 50),)})
        (tmp_path / "masks").mkdir(exist_ok=True)
        write_checkpoint(tmp_path / "masks" / str(number + 1), masks[-1])
    folders = [write_checkpoint(tmp_path / f"model{n}", state) for n, state in enumerate((base, *experts))]
    sources = [open_checkpoint(folder) for folder in folders]
    method = AdaRank(statistics=str(tmp_path / "masks"))
    merge(sources[0], [(sources[1], 0.5), (sources[2], None)], method, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    merged = merge_state_dicts(base, experts, method=AdaRank(), coefficients=[0.5, None], statistics=masks)
    assert all(torch.equal(written[name], merged[name]) for name in merged)
    plain = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.5, 0.3])
    differing = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert differing == {"layers.0.weight"}
    without = merge_state_dicts(base, experts, method=AdaRank(), coefficients=[0.5, None])
    assert all(torch.equal(without[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_equals_the_formula(dtype: torch.dtype) -> None:
    base, experts = make_models(2, dtype, task_size=0.1)
    name, coefficients = "layers.0.weight", (0.5, 0.3)
    masks = [{name: (torch.arange(50) % divisor > 0).float()} for divisor in (2, 3)]
    merged = merge_state_dicts(base, experts, method=AdaRank(), coefficients=coefficients, statistics=masks)
    expected = base[name].double()
    for expert, coefficient, mask in zip(experts, coefficients, masks, strict=True):
        left, values, right = torch.linalg.svd(expert[name].double() - base[name].double(), full_matrices=False)
        expected = expected + coefficient * (left * (values * mask[name])) @ right
    # Neighbouring components turn into each other by an epsilon of the largest value, below 3, over the gap between
    # theirs, above 3e-3 here; which moves the matrix by that times a value below 3.
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = float(expected.abs().max())
    assert float((merged[name].double() - expected).abs().max()) <= torch.finfo(dtype).eps * size + 1e4 * compute
    plain = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=coefficients)
    assert float((plain[name].double() - expected).abs().max()) > 0.05  # control


def test_refuses() -> None:
    vectors, method = make_vectors(), AdaRank(steps=2)
    with pytest.raises(UsageError, match="adarank: 1 tasks for 2 experts"):
        learn_masks(Classifier(), vectors, tasks(1), method)
    with pytest.raises(UsageError, match="1 coefficients for 2 experts"):
        learn_masks(Classifier(), vectors, tasks(), method, start=[0.3])
    with pytest.raises(UsageError, match="every tensor belongs to a head"):
        learn_masks(Classifier(), vectors, tasks(), method, heads=[weights(1), weights(2)])
    layers = [{name: weights(seed)[name] for name in LAYERS} for seed in (1, 2)]
    with pytest.raises(UsageError, match="no linear layer whose weight is a tensor of its own"):
        learn_masks(Classifier(), vectors, tasks(), method, heads=layers)
    with pytest.raises(Mismatch, match="more: a head's tensor that the base does not hold"):
        learn_masks(Classifier(), vectors, tasks(), method, heads=[{"more": torch.zeros(1)}, {}])
    with pytest.raises(BadInput, match="no examples to learn from"):
        learn_masks(Classifier(), vectors, [make_task(0, 1), tasks()[0]], method)


@pytest.mark.parametrize(
    "masks",
    [
        [{"layers.0.weight": torch.ones(49)}] * 2,
        [{"layers.0.weight": torch.ones(50)}, {"embed.weight": torch.ones(16)}],
        [{"layers.0.bias": torch.ones(50)}] * 2,
        [{"gone.weight": torch.ones(50)}] * 2,
    ],
    ids=["another length", "of one expert only", "no matrix", "no such tensor"],
)
def test_refuses_masks_of_other_weights(masks: list[State]) -> None:
    base, experts = make_models(2)
    with pytest.raises(Mismatch, match="is not one of the components of"):
        merge_state_dicts(base, experts, method=AdaRank(), statistics=masks)
    fitting = [{"layers.0.weight": torch.ones(50)}] * 2
    merge_state_dicts(base, experts, method=AdaRank(), statistics=fitting)  # control


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (AdaRank(density=0), r"density=0: must lie in \(0, 1\]"),
        (AdaRank(temperature=0), "temperature=0: must be positive"),
        (AdaRank(start=float("nan")), "start=nan: must be a finite number"),
        (AdaRank(learning_rate=0), "learning_rate=0: must be positive"),
        (AdaRank(steps=0), "steps=0, batch_size=16: at least one of each"),
        (AdaRank(examples=0), "examples=0: at least one"),
    ],
)
def test_refuses_settings(method: AdaRank, message: str) -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match=message):
        merge_state_dicts(base, experts, method=method)


def test_the_summary_has_entropies_and_what_is_kept() -> None:
    masks = ({"a": torch.tensor([1.0, 0.0]), "b": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)})
    learnt = LearntMasks(masks, {"a": (0.2, 0.4)}, ((1.0, 2.0), (0.5, 1.0)))
    assert learnt.summary == "Entropy 1.500 -> 0.750 nats; components kept 75.0%, 100.0%"
    assert learnt.facts["kept"] == {"a": [1, 2], "b": [2, 2]}
