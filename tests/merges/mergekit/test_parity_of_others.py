"""The same criterion for mergekit's methods on spheres, and for those that pick weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from merges.mergekit.test_parity import OUT_DTYPES, assert_equal, control, task_sizes, with_mergekit
from merges.small_models import State, make_models
from unmergeable.merges import (
    ArceeFusion,
    BreadcrumbsTies,
    DellaLinear,
    Karcher,
    Linear,
    Merge,
    MultiSlerp,
    NearSwap,
    NuSlerp,
    Ram,
    Sce,
    TaskArithmetic,
    merge_state_dicts,
)

WEIGHTS = [1.0, 0.5, 1.25]


def all_sizes(base: State | None, experts: list[State]) -> Any:
    """What a sum of all models adds up, with factors of at most 2 on the sphere between them."""
    states = experts if base is None else [base, *experts]
    return lambda name: sum((2 * state[name].double().abs() for state in states), torch.zeros(()))


ON_SPHERES: dict[str, tuple[str, Merge, dict[str, Any], bool, int]] = {
    "karcher": ("karcher", Karcher(), {}, False, 3),
    "karcher, one step": ("karcher", Karcher(iterations=1), {"max_iter": 1}, False, 3),
    "multislerp": ("multislerp", MultiSlerp(), {"weight": WEIGHTS}, True, 3),
    "multislerp around zero": ("multislerp", MultiSlerp(origin="zero"), {"weight": WEIGHTS}, False, 3),
    "multislerp, raw weights": (
        "multislerp", MultiSlerp(normalize=False), {"weight": WEIGHTS, "normalize_weights": False}, True, 3,
    ),
    "nuslerp": ("nuslerp", NuSlerp(), {"weight": WEIGHTS[:2]}, True, 2),
    "nuslerp around zero": ("nuslerp", NuSlerp(origin="zero"), {"weight": WEIGHTS[:2]}, False, 2),
    "nuslerp by rows": (
        "nuslerp", NuSlerp(along="row"), {"weight": WEIGHTS[:2], "nuslerp_flatten": False}, True, 2,
    ),
    "nuslerp by columns": (
        "nuslerp", NuSlerp(along="column"),
        {"weight": WEIGHTS[:2], "nuslerp_flatten": False, "nuslerp_row_wise": True}, True, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("out", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("case", ON_SPHERES)
def test_on_spheres(case: str, out: torch.dtype) -> None:
    theirs_name, method, parameters, has_base, count = ON_SPHERES[case]
    base, experts = make_models(count, torch.float32, task_size=0.5)
    start = base if has_base else None
    coefficients = parameters.get("weight")
    ours = merge_state_dicts(start, experts, method=method, coefficients=coefficients, out_dtype=out)
    theirs = with_mergekit(theirs_name, start, experts, parameters, out)
    sizes = all_sizes(start, experts)
    if case in ("nuslerp by rows", "nuslerp by columns"):
        axis = -1 if case.endswith("rows") else 0
        assert_equal(ours, theirs, sizes, left_out=_nearly_opposite(base, experts, axis), at_most=0.1)
    else:
        assert_equal(ours, theirs, sizes)
    straight = merge_state_dicts(start, experts, method=Linear(), coefficients=coefficients, out_dtype=out)
    control(straight, theirs, sizes)


def _nearly_opposite(base: State, experts: list[State], axis: int) -> Any:
    """Short rows may point to opposite sides: the weights, over the sine of the angle, are then no longer at most 1."""

    def marked(name: str) -> Tensor:
        first, second = (expert[name].double() - base[name].double() for expert in experts)
        cosine = torch.nn.functional.cosine_similarity(first, second, dim=axis).unsqueeze(axis)
        return (cosine < -0.7).expand_as(first)

    return marked


def test_models_of_several_blocks() -> None:
    base, experts = make_models(3, torch.float32, task_size=0.5, several_blocks=True)
    for name, method, parameters, start in (
        ("karcher", Karcher(), {}, None),
        ("multislerp", MultiSlerp(), {"weight": WEIGHTS}, base),
        ("ram", Ram(threshold=0.3), {"epsilon": 0.3}, base),
    ):
        ours = merge_state_dicts(start, experts, method=method, coefficients=parameters.get("weight"))
        assert_equal(ours, with_mergekit(name, start, experts, parameters, torch.float32), all_sizes(start, experts))


@pytest.mark.parametrize("out", OUT_DTYPES, ids=str)
def test_nearswap(out: torch.dtype) -> None:
    base, experts = make_models(1, torch.float32)
    ours = merge_state_dicts(base, experts, method=NearSwap(t=0.01), out_dtype=out)
    theirs = with_mergekit("nearswap", base, experts, {"t": 0.01}, out)
    assert_equal(ours, theirs, task_sizes(base, experts, [1.0]))
    whole = merge_state_dicts(base, experts, method=TaskArithmetic(scaling_coefficient=1.0), out_dtype=out)
    control(whole, theirs, task_sizes(base, experts, [1.0]))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["ram", "ramplus_tl"])
def test_ram(name: str, stored: torch.dtype) -> None:
    base, experts = make_models(3, stored)
    amplified = {"amplify": 0.4, "most": 0.9} if name == "ramplus_tl" else {}
    theirs_amplified = {"r": 0.4, "alpha": 0.9} if name == "ramplus_tl" else {}
    ours = merge_state_dicts(base, experts, method=Ram(threshold=0.02, **amplified))
    theirs = with_mergekit(name, base, experts, {"epsilon": 0.02, **theirs_amplified}, stored)
    sizes = task_sizes(base, experts, [2.0] * 3)
    assert_equal(ours, theirs, sizes, left_out=_near(0.02, base, experts), at_most=1e-3)
    control(merge_state_dicts(base, experts, method=Ram(threshold=0.0)), theirs, sizes)
    if amplified:
        control(merge_state_dicts(base, experts, method=Ram(threshold=0.02)), theirs, sizes)


def _near(threshold: float, base: State, experts: list[State]) -> Any:
    """Task vectors whose distance to the threshold is a rounding: float32 differences may fall on either side."""

    def marked(name: str) -> Tensor:
        changes = torch.stack([(expert[name].double() - base[name].double()).abs() for expert in experts])
        rounding = 2 * torch.finfo(torch.float32).eps * base[name].double().abs()
        return ((changes - threshold).abs() <= rounding).any(dim=0)

    return marked


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
def test_sce(density: float) -> None:
    base, experts = make_models(3, torch.float32)
    ours = merge_state_dicts(base, experts, method=Sce(density=density))
    theirs = with_mergekit("sce", base, experts, {"select_topk": density}, torch.float32)
    # A sum of weighted task vectors over the sum of their weights is no larger than the largest.
    sizes = task_sizes(base, experts, [3.0] * 3)
    assert_equal(ours, theirs, sizes, left_out=_undecided(base, experts), at_most=1e-3)
    control(merge_state_dicts(base, experts, method=Sce(density=0.3)), theirs, sizes)


def _undecided(base: State, experts: list[State]) -> Any:
    """Signs that a sum below its own rounding error elects."""

    def marked(name: str) -> Tensor:
        changes = torch.stack([expert[name].double() - base[name].double() for expert in experts])
        return changes.sum(dim=0).abs() <= 1e-6 * changes.abs().sum(dim=0)

    return marked


def test_arcee_fusion() -> None:
    base, experts = make_models(1, torch.float32, task_size=0.3)
    ours = merge_state_dicts(base, experts, method=ArceeFusion())
    theirs = with_mergekit("arcee_fusion", base, experts, {}, torch.float32)
    sizes = task_sizes(base, experts, [1.0])
    assert_equal(ours, theirs, sizes)
    control(merge_state_dicts(base, experts, method=ArceeFusion(width=0.5)), theirs, sizes)
    changed = torch.cat([(ours[name] != base[name]).reshape(-1) for name in theirs])
    assert 0 < changed.double().mean() < 0.5


def test_breadcrumbs_ties() -> None:
    base, experts = make_models(3, torch.float32)
    settings = {"density": 0.5, "gamma": 0.1}
    method = BreadcrumbsTies(**settings, average="sum", undecided="positive")
    ours = merge_state_dicts(base, experts, method=method, coefficients=WEIGHTS)
    listed = {name: [value] * 3 for name, value in settings.items()}
    theirs = with_mergekit("breadcrumbs_ties", base, experts, {"weight": WEIGHTS, **listed}, torch.float32)
    sizes = task_sizes(base, experts, WEIGHTS)
    assert_equal(ours, theirs, sizes, left_out=_undecided(base, experts), at_most=1e-3)
    without = BreadcrumbsTies(density=0.5, gamma=0.0, average="sum", undecided="positive")
    control(merge_state_dicts(base, experts, method=without, coefficients=WEIGHTS), theirs, sizes)


def test_della_linear_that_drops_nothing() -> None:
    base, experts = make_models(3, torch.float32)
    ours = merge_state_dicts(base, experts, method=DellaLinear(density=1.0, rescale="norm"), coefficients=WEIGHTS)
    theirs = with_mergekit("della_linear", base, experts, {"weight": WEIGHTS, "density": [1.0] * 3}, torch.float32)
    assert_equal(ours, theirs, task_sizes(base, experts, WEIGHTS))
