"""``dare_ties``: election among thinned task vectors, against a reference and peft."""

import pytest
import torch
from peft.utils import merge_utils

from merges.small_models import DTYPES, flat, make_models, rounding_bound, size_bound
from merges.test_dare_linear import masks_of, operand
from unmergeable.errors import UsageError
from unmergeable.merges import DareTies, Ties, merge_state_dicts
from unmergeable.merges.blocks import Scratch
from unmergeable.merges.election import Average, Election
from unmergeable.merges.thinning import merge_elected

COEFFICIENTS = [1.0, 0.5, 1.25]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average", ["count", "weight", "sum"])
def test_equals_a_reference(dtype: torch.dtype, average: Average) -> None:
    base, experts = make_models(3, dtype, several_blocks=dtype == torch.float32)
    density = 0.4
    merged = flat(
        merge_state_dicts(base, experts, method=DareTies(density=density, average=average), coefficients=COEFFICIENTS)
    )

    thinned = torch.stack(
        [
            c / density * mask * (flat(expert) - flat(base))
            for c, mask, expert in zip(COEFFICIENTS, masks_of(experts, density), experts, strict=True)
        ]
    )
    mass = thinned.sum(dim=0)
    agree = (thinned.sign() == mass.sign()) & (thinned != 0)
    weights = torch.tensor(COEFFICIENTS, dtype=torch.float64)[:, None]
    divisor = {
        "count": agree.sum(dim=0).double(),
        "weight": (agree * weights).sum(dim=0),
        "sum": torch.ones_like(mass),
    }[average]
    expected = flat(base) + torch.where(agree, thinned, 0).sum(dim=0) / torch.where(divisor == 0, 1, divisor)
    decided = mass.abs() > 12 * torch.finfo(torch.float32).eps * thinned.abs().sum(dim=0)
    decided |= (thinned == 0).all(dim=0)
    # divided by a coefficient below 1, its own expert's part grows again
    sizes = [max(c, 1) / density for c in COEFFICIENTS]
    bound = rounding_bound(size_bound(base, experts, sizes), dtype, operations=18)
    assert bool(((merged - expected).abs() <= bound)[decided].all())
    assert float(decided.double().mean()) > 0.995
    # Control: without the election everything is added up.
    assert bool(((merged - flat(base) - thinned.sum(dim=0)).abs() > bound)[decided].any())


def test_nothing_dropped_is_ties_without_a_trim() -> None:
    base, experts = make_models(2, torch.bfloat16)
    dare = merge_state_dicts(base, experts, method=DareTies(density=1))
    assert torch.equal(flat(dare), flat(merge_state_dicts(base, experts, method=Ties(density=1))))


def test_equals_peft_for_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft divides by the number that agree, and lets a mass of zero elect +."""
    generator = torch.Generator().manual_seed(1)
    tasks = [torch.randint(-64, 65, (40, 50), generator=generator).float() / 64 for _ in range(3)]
    masks = [(torch.rand(40, 50, generator=generator) < 0.5).float() for _ in range(3)]
    drawn = iter(masks)
    monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda _: next(drawn))
    expected = merge_utils.dare_ties(tasks, torch.ones(3), density=0.5)

    operands = [operand(torch.zeros(40, 50)), *map(operand, tasks)]
    merged = merge_elected(
        "weight",
        operands,
        list(map(operand, masks)),
        Scratch(),
        factors=[2.0] * 3,
        election=Election([1.0] * 3, 1.0, "count", "positive"),
    )
    # Multiples of 1/64 add up exactly; both divide once.
    assert torch.equal(merged, expected)


def test_refuses() -> None:
    base, experts = make_models(2)
    with pytest.raises(UsageError, match="must be positive"):
        merge_state_dicts(base, experts, method=DareTies(), coefficients=[1.0, -1.0])
    with pytest.raises(UsageError, match="density"):
        merge_state_dicts(base, experts, method=DareTies(density=0))
    with pytest.raises(UsageError, match="rescale"):
        merge_state_dicts(base, experts, method=DareTies(rescale="l1"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="average"):
        merge_state_dicts(base, experts, method=DareTies(average="mean"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="0 experts given, at least 1 needed"):
        merge_state_dicts(base, [], method=DareTies())
