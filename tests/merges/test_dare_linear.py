"""``dare_linear``: the formula under its own masks, an unbiased estimate of task arithmetic, peft's pruning."""

from math import sqrt

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from merges.small_models import DTYPES, State, flat, make_models, rounding_bound, size_bound
from unmergeable.errors import UsageError
from unmergeable.merges import DareLinear, TaskArithmetic, merge_state_dicts
from unmergeable.merges.blocks import Operand, Scratch, tensor_operand
from unmergeable.merges.masks import bernoulli_mask, mask_stream
from unmergeable.merges.thinning import compensated, merge_thinned

COEFFICIENTS = [0.3, 1.0, -0.5]


def masks_of(states: list[State], density: float, *, seed: int = 0) -> list[Tensor]:
    """The masks that a merge of these experts uses, flat."""
    return [
        torch.cat(
            [
                torch.cat(
                    [*bernoulli_mask(mask_stream(seed, number, name), density, operand(tensor)).read(2**20)]
                    or [torch.zeros(0)]
                )
                for name, tensor in state.items()
                if tensor.is_floating_point()
            ]
        ).double()
        for number, state in enumerate(states, start=1)
    ]


def operand(tensor: Tensor) -> Operand:
    return tensor_operand("a model", tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.2, 0.8, 1.0])
def test_equals_the_formula(dtype: torch.dtype, density: float) -> None:
    base, experts = make_models(3, dtype, several_blocks=dtype == torch.float32)
    merged = flat(
        merge_state_dicts(base, experts, method=DareLinear(density=density, seed=3), coefficients=COEFFICIENTS)
    )
    masks = masks_of(experts, density, seed=3)
    triples = list(zip(COEFFICIENTS, masks, experts, strict=True))
    expected = flat(base) + sum(c / density * mask * (flat(expert) - flat(base)) for c, mask, expert in triples)
    # per expert a difference, a mask, a rounded coefficient and a product, then 3 sums
    bound = rounding_bound(size_bound(base, experts, [c / density for c in COEFFICIENTS]), dtype, operations=15)
    assert bool(((merged - expected).abs() <= bound).all())
    if density < 1:  # control: the masks of another seed are other masks
        other = flat(merge_state_dicts(base, experts, method=DareLinear(density=density), coefficients=COEFFICIENTS))
        assert bool(((other - expected).abs() > bound).any())


def test_nothing_dropped_is_task_arithmetic() -> None:
    base, experts = make_models(2, torch.bfloat16)
    for rescale in ("density", "norm", "none"):
        dare = merge_state_dicts(base, experts, method=DareLinear(density=1, rescale=rescale), coefficients=[0.3, 0.4])
        assert torch.equal(
            flat(dare), flat(merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.3, 0.4]))
        )


def test_keeps_the_expectation() -> None:
    """Over seeds the mean of the merges approaches task arithmetic, as only the factor 1/density makes it."""
    base, (expert,) = make_models(1)
    seeds, density = 20, 0.5
    merges = [
        flat(merge_state_dicts(base, [expert], method=DareLinear(density=density, seed=s), coefficients=[1.0]))
        for s in range(seeds)
    ]
    error = torch.stack(merges).mean(dim=0) - flat(expert)
    task_vector = flat(expert) - flat(base)
    # each merge errs by +tau or -tau with equal probability at density 1/2
    deviation = float(task_vector.norm()) / sqrt(seeds)
    assert float(error.norm()) == pytest.approx(deviation, rel=0.05)
    unscaled = flat(
        merge_state_dicts(base, [expert], method=DareLinear(density=density, rescale="none"), coefficients=[1.0])
    )
    assert (
        float((unscaled - flat(base)).norm()) < 0.8 * float(task_vector.norm()) < float((merges[0] - flat(base)).norm())
    )


def test_norm_keeps_the_l1_norm_of_each_tensor() -> None:
    base, (expert,) = make_models(1)
    merged = merge_state_dicts(base, [expert], method=DareLinear(density=0.3, rescale="norm"), coefficients=[1.0])
    paper = merge_state_dicts(base, [expert], method=DareLinear(density=0.3), coefficients=[1.0])
    for name in ("embed.weight", "layers.0.weight", "layers.0.bias"):
        before = (expert[name] - base[name]).double().abs().sum()
        after = (merged[name] - base[name]).double().abs().sum()
        assert float(after) == pytest.approx(float(before), rel=1e-4)  # the merge itself is rounded near the base
        control = (paper[name] - base[name]).double().abs().sum()
        assert abs(float(control / before) - 1) > 1e-4


def test_the_same_seed_gives_the_same_merge_whatever_the_order_of_tensors() -> None:
    base, experts = make_models(2, torch.bfloat16)

    def turned(state: State) -> State:
        return dict(reversed(state.items()))

    merged = merge_state_dicts(base, experts, method=DareLinear())
    other = merge_state_dicts(turned(base), [turned(expert) for expert in experts], method=DareLinear())
    assert all(torch.equal(merged[name], other[name]) for name in base)


def test_equals_peft_for_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft adds pruned task vectors of one tensor; its draws are replaced by a mask of ours."""
    generator = torch.Generator().manual_seed(1)
    tasks = [torch.randn(40, 50, generator=generator) for _ in range(2)]
    masks = [(torch.rand(40, 50, generator=generator) < 0.25).float() for _ in range(2)]
    weights = [0.5, 2.0]
    drawn = iter(masks)
    monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda _: next(drawn))
    expected = merge_utils.dare_linear(tasks, torch.tensor(weights), density=0.25)

    operands = [operand(torch.zeros(40, 50)), *map(operand, tasks)]
    scratch = Scratch()
    factors = compensated(weights, operands, list(map(operand, masks)), [0.25, 0.25], "density", scratch)
    merged = merge_thinned("weight", operands, list(map(operand, masks)), scratch, factors=factors)
    assert torch.equal(merged, expected)  # densities and weights are powers of two: the same sums, rounded once


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DareLinear(density=0), "density"),
        (DareLinear(density=1.1), "density"),
        (DareLinear(scaling_coefficient=float("inf")), "scaling_coefficient"),
        (DareLinear(rescale="l2"), "rescale=l2: must be one of density, norm, none"),  # type: ignore[arg-type]
    ],
)
def test_refuses_settings(method: DareLinear, message: str) -> None:
    base, experts = make_models(1)
    with pytest.raises(UsageError, match=message):
        merge_state_dicts(base, experts, method=method)
