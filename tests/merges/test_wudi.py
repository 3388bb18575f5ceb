"""``wudi`` takes Adam's steps towards the task vector that disturbs each expert's inputs least."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from merges.small_models import flat, make_models
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges import IsoC, Wudi, merge_state_dicts
from unmergeable.merges.wudi import normal_equations
from unmergeable.network.disk_weights import find_places
from unmergeable.network.linear_layers import linear_layers
from zoo import TOYS, random_network

EPS = torch.finfo(torch.float64).eps


def matrices(count: int, rows: int, columns: int) -> list[Tensor]:
    """Of other sizes from expert to expert, so that dividing by the norms shows."""
    generator = torch.Generator().manual_seed(3)
    return [
        (number + 1) * torch.randn(rows, columns, generator=generator, dtype=torch.float64) for number in range(count)
    ]


def loss(merged: Tensor, task_matrices: list[Tensor]) -> Tensor:
    """As the paper has it."""
    terms = [((merged - own) @ own.T).square().sum() / own.square().sum() for own in task_matrices]
    return torch.stack(terms).sum()


def descended(task_matrices: list[Tensor], *, rate: float, steps: int) -> Tensor:
    """By automatic differentiation of the loss, and Adam as its paper has it."""
    merged = sum(task_matrices, torch.zeros_like(task_matrices[0]))
    first, second = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, steps + 1):
        leaf = merged.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, task_matrices), leaf)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        merged = merged - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return merged


@pytest.mark.parametrize(("rows", "columns"), [(8, 12), (12, 8)])
@pytest.mark.parametrize("count", [2, 3])
def test_equals_automatic_differentiation_of_the_loss(rows: int, columns: int, count: int) -> None:
    task_matrices = matrices(count, rows, columns)
    expected = descended(task_matrices, rate=0.01, steps=40)
    merged = Wudi(learning_rate=0.01, steps=40).merge_matrices([matrix.clone() for matrix in task_matrices])
    # A gradient is off by its roundings, and Adam divides them by no less than 1e-8: 40 steps add up.
    assert float((merged - expected).abs().max()) < 1e-9
    start = sum(task_matrices, torch.zeros(()))
    assert float((merged - start).abs().max()) > 0.1  # control
    across = Wudi(learning_rate=0.01, steps=40, inputs_along="rows").merge_matrices(
        [m.T.clone() for m in task_matrices]
    )
    assert float((across - expected.T).abs().max()) < 1e-9
    wrong = Wudi(learning_rate=0.01, steps=40).merge_matrices([m.T.clone() for m in task_matrices])
    assert float((wrong - expected.T).abs().max()) > 0.1  # control: the axis matters


def test_goes_to_where_the_loss_is_least() -> None:
    """With many steps; the published ones stop on the way."""
    task_matrices = matrices(2, 16, 8)
    total, aims = normal_equations(task_matrices)
    least = torch.linalg.solve(total, aims.T).T
    leaf = least.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, task_matrices), leaf)
    at_start = sum(task_matrices, torch.zeros(()))
    leaf = at_start.clone().requires_grad_()
    (steep,) = torch.autograd.grad(loss(leaf, task_matrices), leaf)
    assert float(gradient.norm()) < 1e4 * EPS * float(steep.norm())
    merged = Wudi(learning_rate=0.01, steps=3000).merge_matrices([matrix.clone() for matrix in task_matrices])
    # Adam circles a minimum at a distance of its rate.
    assert float((merged - least).abs().max()) < 0.01
    published = Wudi().merge_matrices([matrix.clone() for matrix in task_matrices])
    assert float((published - at_start).abs().max()) <= 300 * 1e-5 * 1.01
    assert (
        float(loss(least, task_matrices)) < float(loss(published, task_matrices)) < float(loss(at_start, task_matrices))
    )


def test_the_minimum_itself_may_be_far_larger_than_the_experts() -> None:
    """Which is why it is not what is merged: noise of a thousandth is what tells two experts apart there."""
    noise = 1e-3
    first = torch.tensor([[1.0, 0.0], [0.0, noise]], dtype=torch.float64)
    second = -torch.tensor([[1.0, noise], [0.0, noise]], dtype=torch.float64)
    total, aims = normal_equations([first, second])
    least = torch.linalg.solve(total, aims.T).T
    assert float(least.norm()) > 0.1 / noise * float(first.norm())
    published = Wudi().merge_matrices([first.clone(), second.clone()])
    assert float(published.norm()) < float(first.norm())


def test_experts_that_do_not_interfere_are_added_up() -> None:
    """The sum is where the loss is 0, and Adam stays there."""
    first, second = torch.zeros(2, 6, 10, dtype=torch.float64).unbind()
    first[:, :4] = matrices(1, 6, 4)[0]
    second[:, 5:] = matrices(1, 6, 5)[0]
    merged = Wudi(learning_rate=0.1).merge_matrices([first.clone(), second.clone()])
    assert torch.allclose(merged, first + second, rtol=0, atol=1e-5)
    overlapping = Wudi(learning_rate=0.1).merge_matrices([first.clone(), second.roll(-3, dims=1).clone()])
    assert float((overlapping - first - second.roll(-3, dims=1)).abs().max()) > 0.1  # control


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_linear_layers_are_merged_and_the_rest_averaged(dtype: torch.dtype) -> None:
    base, experts = make_models(2, dtype, task_size=0.1)
    base, *experts = [
        {"wte.weight" if name == "embed.weight" else name: t for name, t in s.items()} for s in (base, *experts)
    ]
    method = Wudi(scaling_coefficient=0.7, learning_rate=0.01, steps=20)
    merged = merge_state_dicts(base, experts, method=method, coefficients=[1.0, 0.5])
    tasks = [
        {name: c * (expert[name].double() - tensor.double()) for name, tensor in base.items()}
        for c, expert in zip((1.0, 0.5), experts, strict=True)
    ]
    for name in ("layers.0.weight", "wte.weight", "layers.0.bias", "layers.1.weight", "scale"):
        pair = [task[name] for task in tasks]
        is_linear = name == "layers.0.weight"
        step = descended(pair, rate=0.01, steps=20) if is_linear else (pair[0] + pair[1]) / 2
        expected = base[name].double() + 0.7 * step
        # Adam divides a gradient by its own size, so a step is off by the rate times the gradient's relative rounding:
        # an epsilon of its terms, which may be ten thousand times what is left of them.
        compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        adam = 20 * 0.01 * 1e4 * compute if is_linear else 0.0
        bound = torch.finfo(dtype).eps * expected.abs() + 8 * compute * (base[name].double().abs() + 1) + adam
        assert bool(((merged[name].double() - expected).abs() <= bound).all()), name
        if is_linear:  # control
            assert bool(((base[name].double() + 0.7 * (pair[0] + pair[1]) - expected).abs() > bound).any())


def test_a_coefficient_scales_what_an_expert_aims_at() -> None:
    first, second = matrices(2, 8, 12)
    total, aims = normal_equations([first, 3 * second])
    plain_total, _ = normal_equations([first, second])
    torch.testing.assert_close(total, plain_total, rtol=0, atol=100 * EPS)
    torch.testing.assert_close(
        aims, normal_equations([first])[1] + 3 * normal_equations([second])[1], rtol=1e-13, atol=0
    )
    assert torch.equal(normal_equations([first, 0 * second])[0], normal_equations([first])[0])


def test_a_zero_task_vector_gives_the_base_and_an_empty_tensor_is_no_trouble() -> None:
    base, _ = make_models(0)
    merged = merge_state_dicts(base, [base, base], method=Wudi())
    assert torch.equal(flat(merged), flat(base))
    assert merged["empty"].shape == (0, 4)


@pytest.mark.parametrize("toy", ["llama", "gpt2", "bert", "vit", "t5", "opt"])
def test_embeddings_are_told_by_their_names(toy: str) -> None:
    network = random_network(TOYS[toy], 0)
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    tied = ("lm_head.weight", "cls.predictions.decoder.weight")  # the engine merges a copy as what it is a copy of
    found = [name for name, place in find_places(network).items() if id(place.parameter) in tables and name not in tied]
    assert not any(map(Wudi().is_whole, found))
    assert all(Wudi().is_whole(layer.name) for layer in linear_layers(network))
    assert all(map(IsoC().is_whole, found))  # control: methods that ask nothing of inputs take them


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Wudi(scaling_coefficient=float("nan")), "scaling_coefficient=nan"),
        (Wudi(learning_rate=0), "learning_rate=0: must be positive"),
        (Wudi(learning_rate=float("inf")), "learning_rate=inf: must be positive"),
        (Wudi(steps=0), "steps=0: at least one"),
        (Wudi(inputs_along="columms"), "inputs_along=columms: must be one of columns, rows"),  # type: ignore[arg-type]
    ],
)
def test_refuses_settings(method: Wudi, message: str) -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match=message):
        merge_state_dicts(base, experts, method=method)


def test_refuses_what_is_not_finite() -> None:
    base, experts = make_models(2)
    experts[0]["layers.0.weight"][0, 0] = torch.nan
    with pytest.raises(BadInput, match=r"layers.0.weight: expert 1 holds NaN"):
        merge_state_dicts(base, experts, method=Wudi())
