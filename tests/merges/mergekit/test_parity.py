"""Equality with mergekit 0.1.5 in its own variants, tensor by tensor, through its functions in this process.

What "equal" means. Both compute in float32 and round once to the output dtype, in another order of operations. With
``size = |theta_0| + sum_i |lambda_i tau_i|`` (for averages and slerp ``sum_i |c_i theta_i|``) each float32 operation
errs by at most half an epsilon of ``size``, so the two float32 results differ by at most ``2 k eps32 size / 2`` after
k operations each, which may push them to neighbouring numbers of the output dtype. Hence the criterion

    |ours - mergekit's| <= eps_out * max(|ours|, |mergekit's|) + 2 k * eps32 / 2 * size

one rounding step of the output, plus what only shows where the terms cancel. Two cases are left out, and counted:

* magnitudes equal to a trimming threshold: we keep all of them, mergekit a number of them that an unstable sort picks;
* signs elected by a mass below its own rounding error.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from merges.small_models import State, make_models
from unmergeable.merges import (
    Breadcrumbs,
    DareLinear,
    DareTies,
    Della,
    Linear,
    Merge,
    ModelStock,
    Slerp,
    TaskArithmetic,
    Ties,
    merge_state_dicts,
)
from unmergeable.merges.blocks import tensor_operand
from unmergeable.merges.della import magprune_mask
from unmergeable.merges.masks import bernoulli_mask, mask_stream

merge_methods = pytest.importorskip(
    "mergekit.merge_methods", reason="mergekit is not installed; pip install mergekit==0.1.5 to compare with it"
)
sparsify = pytest.importorskip("mergekit.sparsify")

WEIGHTS = [1.0, 0.5, 1.25]
NAMES = "abcdef"
EPS32 = torch.finfo(torch.float32).eps
OPERATIONS = 20
OUT_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def with_mergekit(
    method: str, base: State | None, experts: list[State], parameters: dict[str, Any], out: torch.dtype
) -> State:
    """mergekit's merge with float32 arithmetic; lists of parameters are per expert."""
    bound = {
        name: dict(zip(NAMES, value, strict=False)) if isinstance(value, list) else value
        for name, value in parameters.items()
    }
    merged = {}
    template = experts[0] if base is None else base
    for name, tensor in template.items():
        # mergekit's DELLA needs rows to rank, and its slerp elements to measure.
        if tensor.is_floating_point() and tensor.numel() and tensor.dim():
            states = experts if base is None else [base, *experts]
            ids = NAMES[: len(experts)] if base is None else ["base", *NAMES[: len(experts)]]
            group = merge_methods.TensorGroup.from_tensors(
                [state[name] for state in states], ids=ids, base_index=None if base is None else 0, name=name
            )
            (merged[name],) = merge_methods.get(method)((group,), parameters=bound, dtype=torch.float32, out_dtype=out)
    return merged


def assert_equal(
    ours: State,
    theirs: State,
    sizes: Callable[[str], Tensor],
    *,
    left_out: Callable[[str], Tensor] | None = None,
    at_most: float = 0.0,
) -> None:
    """The criterion of this module; ``left_out`` marks what it does not cover, ``at_most`` a fraction of all."""
    marked = count = 0
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        one, other = ours[name].double(), expected.double()
        step = torch.finfo(expected.dtype).eps * torch.maximum(one.abs(), other.abs())
        step += torch.finfo(expected.dtype).smallest_normal * torch.finfo(expected.dtype).eps
        near = (one - other).abs() <= step + OPERATIONS * EPS32 * sizes(name)
        if left_out is not None:
            marked += int(left_out(name).sum())
            near |= left_out(name)
        count += expected.numel()
        assert bool(near.all()), name
    assert marked <= at_most * count


def task_sizes(base: State, experts: list[State], factors: list[float]) -> Callable[[str], Tensor]:
    def size(name: str) -> Tensor:
        tasks = [abs(f) * (e[name].double() - base[name].double()).abs() for f, e in zip(factors, experts, strict=True)]
        return base[name].double().abs() + sum(tasks, torch.zeros(()))

    return size


def control(ours: State, theirs: State, sizes: Callable[[str], Tensor]) -> None:
    with pytest.raises(AssertionError):
        assert_equal(ours, theirs, sizes)


@pytest.mark.parametrize("out", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(stored: torch.dtype, out: torch.dtype, normalize: bool) -> None:
    _, experts = make_models(3, stored, several_blocks=stored == out == torch.float32)
    ours = merge_state_dicts(None, experts, method=Linear(normalize=normalize), coefficients=WEIGHTS, out_dtype=out)
    theirs = with_mergekit("linear", None, experts, {"weight": WEIGHTS, "normalize": normalize}, out)

    def sizes(name: str) -> Tensor:
        return sum((w * e[name].double().abs() for w, e in zip(WEIGHTS, experts, strict=True)), torch.zeros(()))

    assert_equal(ours, theirs, sizes)
    control(
        merge_state_dicts(None, experts, method=Linear(normalize=normalize), coefficients=WEIGHTS[::-1], out_dtype=out),
        theirs,
        sizes,
    )


@pytest.mark.parametrize("out", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_task_arithmetic(stored: torch.dtype, out: torch.dtype) -> None:
    base, experts = make_models(3, stored, several_blocks=stored == out == torch.float32)
    weights = [0.3, 1.0, -0.5]
    ours = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=weights, out_dtype=out)
    theirs = with_mergekit("task_arithmetic", base, experts, {"weight": weights}, out)
    sizes = task_sizes(base, experts, weights)
    assert_equal(ours, theirs, sizes)
    control(
        merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=weights[::-1], out_dtype=out),
        theirs,
        sizes,
    )


@pytest.mark.parametrize("out", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("task_size", [0.01, 1.0])
def test_slerp(out: torch.dtype, t: float, task_size: float) -> None:
    base, experts = make_models(1, torch.bfloat16, task_size=task_size)
    ours = merge_state_dicts(None, [base, *experts], method=Slerp(t=t), out_dtype=out)
    theirs = with_mergekit("slerp", base, experts, {"t": t}, out)

    def sizes(name: str) -> Tensor:
        return base[name].double().abs() + experts[0][name].double().abs()

    assert_equal(ours, theirs, sizes)
    if t != 0.3:
        control(merge_state_dicts(None, [base, *experts], method=Slerp(t=0.5), out_dtype=out), theirs, sizes)


@pytest.mark.parametrize("out", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(out: torch.dtype, count: int, filter_wise: bool) -> None:
    base, experts = make_models(count, torch.float32)
    # A shared part, so that the angles are far from the right one at which everything is the base.
    _, (shared,) = make_models(1, torch.float32, seed=5, task_size=0.02)
    experts = [
        {n: t + shared[n] - base[n] if t.is_floating_point() else t for n, t in expert.items()} for expert in experts
    ]
    base = {name: tensor for name, tensor in base.items() if tensor.dim() != 4}  # rows of two have any angle
    experts = [{name: expert[name] for name in base} for expert in experts]
    method = ModelStock(filter_wise=filter_wise, smallest_norms=1e-6)
    ours = merge_state_dicts(base, experts, method=method, out_dtype=out)
    theirs = with_mergekit("model_stock", base, experts, {"filter_wise": filter_wise}, out)
    sizes = task_sizes(base, experts, [1.0] * count)
    assert_equal(ours, theirs, sizes)
    control(merge_state_dicts(base, experts, method=Linear(), out_dtype=out), theirs, sizes)


def test_model_stock_at_its_singularity() -> None:
    base = {"weight": torch.full((4,), 0.5)}
    experts = [{"weight": base["weight"] + sign} for sign in (1.0, -1.0)]
    ours = merge_state_dicts(base, experts, method=ModelStock(smallest_norms=1e-6))
    assert torch.equal(ours["weight"], with_mergekit("model_stock", base, experts, {}, torch.float32)["weight"])


def magnitudes_at(base: State, expert: State, name: str, ranks: list[int]) -> Tensor:
    """Where a task vector has exactly a magnitude of one of these ranks."""
    magnitudes = (expert[name].float() - base[name].float()).abs()
    ordered = magnitudes.reshape(-1).sort(descending=True).values
    at = torch.zeros_like(magnitudes, dtype=torch.bool)
    for rank in ranks:
        if 1 <= rank <= len(ordered):
            equal = magnitudes == ordered[rank - 1]
            at |= equal & (int(equal.sum()) > 1)  # of a single one there is nothing to pick
    return at


@pytest.mark.parametrize("out", OUT_DTYPES, ids=str)
@pytest.mark.parametrize(("stored", "left"), [(torch.bfloat16, 0.3), (torch.float32, 0.02)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_ties(stored: torch.dtype, left: float, out: torch.dtype, normalize: bool, density: float) -> None:
    base, experts = make_models(3, stored, several_blocks=stored == out == torch.float32)
    method = Ties(density=density, trim="tensor", average="weight" if normalize else "sum", undecided="positive")
    ours = merge_state_dicts(base, experts, method=method, coefficients=WEIGHTS, out_dtype=out)
    parameters = {"weight": WEIGHTS, "density": density, "normalize": normalize}
    theirs = with_mergekit("ties", base, experts, parameters, out)

    def left_out(name: str) -> Tensor:
        at = undecided(base, experts, WEIGHTS, name, density)
        if density < 1:
            rank = max(1, int(density * base[name].numel()))
            for expert in experts:
                at |= magnitudes_at(base, expert, name, [rank])
        return at

    sizes = task_sizes(base, experts, [2 * w for w in WEIGHTS])  # divided by 0.5 where one expert agrees
    assert_equal(ours, theirs, sizes, left_out=left_out, at_most=left)
    paper = merge_state_dicts(base, experts, method=Ties(density=density * 0.9), coefficients=WEIGHTS, out_dtype=out)
    with pytest.raises(AssertionError):
        assert_equal(paper, theirs, sizes, left_out=left_out, at_most=left)


def undecided(base: State, experts: list[State], weights: list[float], name: str, density: float) -> Tensor:
    """Where the elected sign hangs on rounding: exact zeros are decided, both let them elect +."""
    tasks = []
    for weight, expert in zip(weights, experts, strict=True):
        task = expert[name].float() - base[name].float()
        threshold = task.abs().reshape(-1).sort(descending=True).values[max(1, int(density * task.numel())) - 1]
        tasks.append(weight * torch.where(task.abs() >= threshold, task, 0).double())
    stacked = torch.stack(tasks)
    mass = stacked.sum(dim=0).abs()
    return (mass <= 4 * EPS32 * stacked.abs().sum(dim=0)) & (stacked != 0).any(dim=0)


@pytest.mark.parametrize("out", OUT_DTYPES, ids=str)
@pytest.mark.parametrize(("stored", "left"), [(torch.bfloat16, 0.5), (torch.float32, 0.02)], ids=str)
@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.1), (0.9, 0.3), (1.0, 0.01)])
def test_breadcrumbs(stored: torch.dtype, left: float, out: torch.dtype, density: float, gamma: float) -> None:
    base, experts = make_models(3, stored, several_blocks=stored == out == torch.float32)
    ours = merge_state_dicts(
        base, experts, method=Breadcrumbs(density=density, gamma=gamma), coefficients=WEIGHTS, out_dtype=out
    )
    parameters = {"weight": WEIGHTS, "density": density, "gamma": gamma}
    theirs = with_mergekit("breadcrumbs", base, experts, parameters, out)

    def left_out(name: str) -> Tensor:
        size = base[name].numel()
        kept = int(density * size)
        outliers = min(int(gamma * size), size - kept)
        at = torch.zeros(base[name].shape, dtype=torch.bool)
        for expert in experts:
            at |= magnitudes_at(base, expert, name, [outliers, outliers + 1, outliers + kept])
        return at

    sizes = task_sizes(base, experts, WEIGHTS)
    assert_equal(ours, theirs, sizes, left_out=left_out if density < 1 else None, at_most=left)
    control(
        merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=WEIGHTS, out_dtype=out), theirs, sizes
    ) if density < 1 else None


def our_masks(base: State, experts: list[State], *, density: float, epsilon: float | None) -> Iterator[Tensor]:
    """Our masks in the order in which mergekit asks for its own."""
    for name, tensor in base.items():
        if tensor.is_floating_point() and tensor.numel() and tensor.dim():
            for number, expert in enumerate(experts, start=1):
                stream, like = mask_stream(0, number, name), tensor_operand("", expert[name])
                mask = (
                    bernoulli_mask(stream, density, like)
                    if epsilon is None
                    else magprune_mask(
                        stream, tensor_operand("", tensor), like, density=density, epsilon=epsilon, divide=False
                    )
                )
                yield torch.cat([block.clone() for block in mask.read(2**20)])


DRAWN: list[tuple[str, Merge, dict[str, Any], float | None]] = [
    ("dare_linear", DareLinear(rescale="norm"), {}, None),
    ("dare_linear", DareLinear(rescale="none"), {"rescale": False}, None),
    ("dare_ties", DareTies(rescale="norm", average="sum"), {}, None),
    ("dare_ties", DareTies(rescale="none", average="weight"), {"rescale": False, "normalize": True}, None),
    ("della", Della(rescale="norm", average="weight", scaling_coefficient=1.0), {}, 0.15),
    (
        "della",
        Della(rescale="none", average="sum", scaling_coefficient=2.0),
        {"rescale": False, "normalize": False, "lambda": 2.0},
        0.15,
    ),
]


@pytest.mark.parametrize(("name", "method", "parameters", "epsilon"), DRAWN, ids=[repr(case[1]) for case in DRAWN])
@pytest.mark.parametrize("out", OUT_DTYPES, ids=str)
def test_dare_and_della_for_one_mask(
    name: str,
    method: Merge,
    parameters: dict[str, Any],
    epsilon: float | None,
    out: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own: dict[str, Any] = {"density": 0.4}
    if name != "dare_linear":
        own["undecided"] = "positive"
    if epsilon is not None:
        own["epsilon"] = epsilon
    method = replace(method, **own)  # type: ignore[type-var]
    base, experts = make_models(3, torch.float32)
    masks = our_masks(base, experts, density=0.4, epsilon=epsilon)
    monkeypatch.setattr(sparsify.torch, "bernoulli", lambda like: next(masks).reshape(like.shape))
    theirs = with_mergekit(name, base, experts, {"weight": WEIGHTS, "density": 0.4, **parameters}, out)
    ours = merge_state_dicts(base, experts, method=method, coefficients=WEIGHTS, out_dtype=out)
    # The rescale factor is about 1/density, its sum good to the square root of the number of terms in epsilons.
    sizes = task_sizes(base, experts, [2 * 2 * w / 0.4 for w in WEIGHTS])
    assert_equal(ours, theirs, sizes, left_out=lambda n: near_undecided(base, experts, n), at_most=0.001)
    other = replace(method, seed=1)  # type: ignore[type-var]
    control(merge_state_dicts(base, experts, method=other, coefficients=WEIGHTS, out_dtype=out), theirs, sizes)


def near_undecided(base: State, experts: list[State], name: str) -> Tensor:
    """Where some subset of the experts, those a mask keeps, cancels to a hundred-thousandth."""
    tasks = [w * (e[name].double() - base[name].double()) for w, e in zip(WEIGHTS, experts, strict=True)]
    close = torch.zeros(base[name].shape, dtype=torch.bool)
    for kept in range(1, 2 ** len(tasks)):
        chosen = [task for number, task in enumerate(tasks) if kept >> number & 1]
        if len(chosen) > 1:
            total, size = sum(chosen), sum(task.abs() for task in chosen)
            # the experts' rescale factors differ by a percent: only a part of the near-cancellations is caught
            close |= torch.as_tensor(total).abs() <= 1e-5 * torch.as_tensor(size)
    return close


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("dare_linear", DareLinear(density=0.3, rescale="norm")),
        ("della", Della(density=0.3, epsilon=0.2, rescale="norm", scaling_coefficient=1.0)),
    ],
)
def test_dare_and_della_in_distribution(name: str, method: Merge) -> None:
    """Fraction kept, mean and variance of what is kept, per tensor, each under its own random numbers."""
    base, (expert,) = make_models(1, torch.float32, several_blocks=True)
    experts = [expert] if name == "dare_linear" else [expert, base]  # the second expert adds nothing
    torch.manual_seed(0)
    parameters = {"weight": 1.0, "density": 0.3, **({"epsilon": 0.2} if name == "della" else {})}
    theirs = with_mergekit(name, base, experts, parameters, torch.float32)
    ours = merge_state_dicts(base, experts, method=method, coefficients=[1.0] * len(experts))
    for tensor in ("embed.weight", "layers.0.weight", "layers.0.bias"):
        task_vector = expert[tensor] - base[tensor]
        size, scale = task_vector.numel(), float(task_vector.std())
        (ours_kept, ours_mean, ours_var), (their_kept, their_mean, their_var) = (
            moments(merged[tensor] - base[tensor], task_vector) for merged in (ours, theirs)
        )
        # Standard errors of a fraction, a mean and a variance; differences of two have sqrt(2) of them.
        allowed = 5 * sqrt(2 / size)
        assert abs(ours_kept - their_kept) < allowed * sqrt(0.3 * 0.7)
        assert abs(ours_kept - 0.3) < allowed * sqrt(0.3 * 0.7)
        assert abs(ours_mean - their_mean) < allowed / sqrt(0.3) * 4 * scale
        assert ours_var == pytest.approx(their_var, rel=allowed / sqrt(0.3) * 3)
    assert abs(0.35 - their_kept) > allowed * sqrt(0.3 * 0.7) or size < 10_000  # control


def moments(change: Tensor, task_vector: Tensor) -> tuple[float, float, float]:
    kept = change != 0
    return float(kept.double().mean()), float(change[kept].mean()), float(change[kept].var())
