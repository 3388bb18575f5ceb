"""Models that do not belong together are refused, in one line that names the tensor."""

from collections.abc import Callable

import pytest
import torch

from merges.small_models import State, cast, make_models
from unmergeable.errors import BadInput, Mismatch, UnmergeableError, UsageError
from unmergeable.merges import MERGES, Linear, Merge, TaskArithmetic, Ties, merge_state_dicts

Spoil = Callable[[State], object]


def rename(old: str, new: str) -> Spoil:
    return lambda state: state.update({new: state.pop(old)})


REFUSED: list[tuple[str, Spoil, type[UnmergeableError], str]] = [
    ("missing", lambda s: s.pop("layers.0.bias"), Mismatch, r"layers.0.bias: in base but not in expert 2"),
    ("extra", lambda s: s.update(more=torch.zeros(2)), Mismatch, r"more: in expert 2 but not in base"),
    ("renamed", rename("scale", "gain"), Mismatch, r"scale: in base but not in expert 2"),
    ("shape", lambda s: s.update(scale=torch.zeros(2)), Mismatch, r"scale: float32 \[\] in base but float32 \[2\]"),
    ("transposed", lambda s: s.update({"embed.weight": s["embed.weight"].T}), Mismatch, r"\[50, 16\] .* \[16, 50\]"),
    ("buffer", lambda s: s["position_ids"].add_(1), Mismatch, r"position_ids: this torch.int64 buffer differs"),
    ("nan", lambda s: s["layers.0.weight"][29, 1:2].fill_(torch.nan), BadInput, r"layers.0.weight: expert 2 holds NaN"),
    ("infinity", lambda s: s["scale"].fill_(torch.inf), BadInput, r"scale: expert 2 holds NaN or infinity"),
    ("untied", lambda s: s.update({"lm_head.weight": s["embed.weight"]}), Mismatch, r"lm_head.weight: in expert 2 but"),
    ("integers", lambda s: s.update(scale=s["scale"].int()), Mismatch, r"scale: float32 .* int32 .* in expert 2"),
]


# Whether the models belong together is looked at once for all methods: with a base, and without one. Values meet the
# arithmetic of each.
CHECKED = [*((method, case) for method in (TaskArithmetic(), Linear()) for case in REFUSED)]
CHECKED += [(method(), case) for method in MERGES.values() for case in REFUSED if case[0] in ("nan", "infinity")]
CHECKED += [(Ties(trim="tensor"), case) for case in REFUSED if case[0] in ("nan", "infinity")]


@pytest.mark.parametrize(
    ("method", "spoil", "error", "message"),
    [(method, *case[1:]) for method, case in CHECKED],
    ids=[f"{method!r}-{case[0]}" for method, case in CHECKED],
)
def test_refuses(method: Merge, spoil: Spoil, error: type[UnmergeableError], message: str) -> None:
    base, experts = make_models(method.most_experts or 2)
    merge_state_dicts(base, experts, method=method)  # control: nothing else is wrong with them
    spoil(experts[-1])
    message = message.replace("expert 2", f"expert {len(experts)}")
    with pytest.raises(error, match=message) as caught:
        merge_state_dicts(base, experts, method=method)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [method() for method in MERGES.values()], ids=repr)
@pytest.mark.parametrize(
    ("base_dtype", "expert_dtypes"),
    [
        (torch.bfloat16, (torch.float16, torch.float32)),
        (torch.float32, (torch.bfloat16, torch.float64)),
        (torch.float64, (torch.float64, torch.float32)),
    ],
    ids=str,
)
def test_precisions_that_differ_are_merged_in_the_widest_and_stored_as_the_base(
    method: Merge, base_dtype: torch.dtype, expert_dtypes: tuple[torch.dtype, ...]
) -> None:
    base, experts = make_models(method.most_experts or 2)
    base = cast(base, base_dtype)
    stored = expert_dtypes[: len(experts)]
    experts = [cast(expert, dtype) for expert, dtype in zip(experts, stored, strict=True)]
    wide = torch.float64 if torch.float64 in (base_dtype, *stored) else torch.float32
    merged = merge_state_dicts(base, experts, method=method)
    # Widening is exact, so that models of one precision that hold the same numbers merge to the same.
    expected = merge_state_dicts(cast(base, wide), [cast(expert, wide) for expert in experts], method=method)
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor.to(base[name].dtype)), name
    # Control: an expert rounded to the base's precision would be another one.
    if base_dtype == torch.bfloat16 and method.name == "task_arithmetic":
        rounded = merge_state_dicts(base, [cast(expert, base_dtype) for expert in experts], method=method)
        assert not all(torch.equal(merged[name], rounded[name]) for name in base)


def test_overflow_is_not_blamed_on_an_input() -> None:
    base = {"weight": torch.full((4,), 40_000.0, dtype=torch.float16)}
    expert = {"weight": torch.full((4,), 60_000.0, dtype=torch.float16)}
    merge_state_dicts(base, [expert], method=TaskArithmetic(), coefficients=[1.0])
    with pytest.raises(BadInput, match=r"weight: the merge overflows torch.float16"):
        merge_state_dicts(base, [expert], method=TaskArithmetic(), coefficients=[2.0])


def test_large_finite_weights_are_not_mistaken_for_overflow() -> None:
    """Their sum, by which a block is checked first, does overflow."""
    base = {"weight": torch.full((1000,), 3e38)}
    assert torch.equal(merge_state_dicts(base, [base], method=TaskArithmetic())["weight"], base["weight"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64], ids=str)
def test_refuses_dtypes_it_cannot_merge(dtype: torch.dtype) -> None:
    state = {"weight": torch.zeros(4).to(dtype)}
    with pytest.raises(BadInput, match=r"weight: .* cannot be merged"):
        merge_state_dicts(state, [state], method=TaskArithmetic())


def test_refuses_models_without_weights() -> None:
    state = {"position_ids": torch.arange(3)}
    with pytest.raises(BadInput, match="nothing to merge"):
        merge_state_dicts(state, [state], method=TaskArithmetic())


def test_refuses_coefficients_of_another_length() -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match="3 coefficients for 2 experts"):
        merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[1.0, 1.0, 1.0])


@pytest.mark.parametrize("method", [method() for method in MERGES.values()], ids=repr)
def test_inputs_stay_as_they_are_and_share_no_memory(method: Merge) -> None:
    base, experts = make_models(method.most_experts or 2)
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in (base, *experts)]
    merged = merge_state_dicts(base, experts, method=method)
    for tensor in merged.values():
        tensor.zero_()
    for state, copy in zip((base, *experts), before, strict=True):
        assert all(torch.equal(state[name], copy[name]) for name in copy)


def test_strided_tensors_and_parameters_merge_like_plain_ones() -> None:
    base, experts = make_models(2)
    expected = merge_state_dicts(base, experts, method=TaskArithmetic())
    strided = {
        name: tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor for name, tensor in base.items()
    }
    assert not strided["layers.0.weight"].is_contiguous()
    trainable = {
        name: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in experts[0].items()
    }
    merged = merge_state_dicts(strided, [trainable, experts[1]], method=TaskArithmetic())
    assert list(merged) == list(base)
    assert all(torch.equal(merged[name], expected[name]) for name in base)
    assert not any(tensor.requires_grad for tensor in merged.values())
