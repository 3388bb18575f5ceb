"""``consensus_ta`` adds what at least two tasks use."""

import pytest
import torch

from merges.small_models import DTYPES, flat, make_models, rounding_bound, size_bound
from unmergeable.errors import UsageError
from unmergeable.merges import ConsensusTa, TaskArithmetic, merge_state_dicts
from unmergeable.merges.variation import Variation

COEFFICIENTS = [1.0, 0.5, 1.25]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("agreement", [1, 2, 3])
def test_equals_the_formula(dtype: torch.dtype, agreement: int) -> None:
    base, experts = make_models(3, dtype, several_blocks=dtype == torch.float32)
    method = ConsensusTa(agreement=agreement, mask_threshold=0.7)
    merged = flat(merge_state_dicts(base, experts, method=method, coefficients=COEFFICIENTS))
    tasks = torch.stack([c * (flat(e) - flat(base)) for c, e in zip(COEFFICIENTS, experts, strict=True)])
    total = tasks.sum(dim=0)
    margins = tasks.abs() - 0.7 * (total - tasks).abs()
    expected = flat(base) + 0.3 * torch.where((margins >= 0).sum(dim=0) >= agreement, total, 0)
    # What is compared is rounded to float32 along the way: 3 products, 3 sums, a difference, a product.
    unsure = (margins.abs() <= 8 * torch.finfo(torch.float32).eps * tasks.abs().sum(dim=0)).any(dim=0)
    unsure &= total != 0
    bound = rounding_bound(size_bound(base, experts, COEFFICIENTS), dtype, operations=12)
    assert bool(((merged - expected).abs() <= bound)[~unsure].all())
    assert float(unsure.double().mean()) < 0.02
    if agreement > 1:  # control: the weights of one task alone are left out
        assert bool(((merged - flat(base) - 0.3 * total).abs() > bound).any())


def test_selfish_weights_stay_and_common_ones_move() -> None:
    base = {"weight": torch.zeros(4)}
    experts = [{"weight": torch.tensor(values)} for values in ([1.0, 1.0, 0.1, 0.0], [1.0, 0.0, 0.0, 0.0])]
    merged = merge_state_dicts(base, experts, method=ConsensusTa(scaling_coefficient=1))
    assert merged["weight"].tolist() == [2.0, 0.0, 0.0, 0.0]
    alone = merge_state_dicts(base, experts, method=ConsensusTa(scaling_coefficient=1, agreement=1))
    assert alone["weight"].tolist() == [2.0, 1.0, pytest.approx(0.1), 0.0]


def test_keeping_everything_is_task_arithmetic() -> None:
    base, experts = make_models(3)
    for agreement, threshold in ((0, 0.4), (3, 0.0)):
        merged = merge_state_dicts(base, experts, method=ConsensusTa(agreement=agreement, mask_threshold=threshold))
        expected = flat(merge_state_dicts(base, experts, method=TaskArithmetic()))
        bound = 2 * rounding_bound(size_bound(base, experts, [1.0] * 3), torch.float32, operations=12)
        assert bool(((flat(merged) - expected).abs() <= bound).all())
    none = merge_state_dicts(base, experts, method=ConsensusTa(agreement=4))
    assert torch.equal(flat(none), flat(base))


def test_each_expert_may_have_its_own_threshold() -> None:
    base = {"weight": torch.zeros(1)}
    experts = [{"weight": torch.tensor([1.0])}, {"weight": torch.tensor([0.5])}]

    def merged(*thresholds: float) -> float:
        variation = Variation(settings={"mask_threshold": thresholds})
        state = merge_state_dicts(base, experts, method=ConsensusTa(scaling_coefficient=1), vary=lambda name: variation)
        return float(state["weight"])

    assert merged(2.0, 0.5) == 1.5  # 1 >= 2 * 0.5, and 0.5 >= 0.5 * 1
    assert merged(0.5, 2.0) == 0.0  # 0.5 < 2 * 1


def test_refuses_settings() -> None:
    base, experts = make_models(2)
    for method in (
        ConsensusTa(agreement=-1),
        ConsensusTa(mask_threshold=-0.1),
        ConsensusTa(mask_threshold=float("inf")),
    ):
        with pytest.raises(UsageError, match=r"agreement|mask_threshold"):
            merge_state_dicts(base, experts, method=method)
