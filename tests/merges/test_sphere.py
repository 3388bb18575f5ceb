"""Merges on spheres and those that pick weights, against what they are defined to be."""

import math

import pytest
import torch

from merges.small_models import flat, make_models
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges import (
    ArceeFusion,
    DellaLinear,
    Karcher,
    Merge,
    MultiSlerp,
    NearSwap,
    NuSlerp,
    Ram,
    Sce,
    merge_state_dicts,
)

State = dict[str, torch.Tensor]


def weights(*rows: list[float]) -> list[State]:
    return [{"w": torch.tensor(row, dtype=torch.float64)} for row in rows]


def test_the_karcher_mean_minimises_the_squared_angles() -> None:
    generator = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(6, generator=generator, dtype=torch.float64)} for _ in range(4)]
    shares = [0.1, 0.2, 0.3, 0.4]
    method = Karcher(iterations=200, tolerance=1e-12)
    mean = merge_state_dicts(None, models, method=method, coefficients=shares)["w"]
    norm = sum(share * model["w"].norm() for share, model in zip(shares, models, strict=True))
    assert mean.norm() == pytest.approx(float(norm), rel=1e-12)

    def spread(point: torch.Tensor) -> float:
        cosines = [torch.nn.functional.cosine_similarity(point, model["w"], dim=0) for model in models]
        return sum(share * math.acos(float(cosine)) ** 2 for share, cosine in zip(shares, cosines, strict=True))

    least = spread(mean)
    for _ in range(20):
        moved = mean + 1e-3 * torch.randn(6, generator=generator, dtype=torch.float64)
        assert spread(moved) > least
    control = merge_state_dicts(None, models, method=Karcher(iterations=0), coefficients=shares)["w"]
    assert spread(control) > least + 1e-6


def test_two_models_on_a_circle() -> None:
    """The mean of two directions is half way, for all three; nuslerp and multislerp keep the mean norm of equals."""
    first, second = weights([3.0, 0.0], [0.0, 3.0])
    half = torch.full((2,), 3 * math.cos(math.pi / 4), dtype=torch.float64)
    for method in (Karcher(), NuSlerp(origin="zero"), MultiSlerp(origin="zero")):
        merged = merge_state_dicts(None, [first, second], method=method)["w"]
        assert torch.allclose(merged, half, atol=1e-7), method.name


def test_zero_opposite_and_absent_directions() -> None:
    zero, one, other = weights([0.0, 0.0], [2.0, 0.0], [-2.0, 0.0])
    assert torch.equal(merge_state_dicts(None, [zero, zero], method=Karcher())["w"], zero["w"])
    # A zero has no direction; its norm counts.
    assert torch.allclose(merge_state_dicts(None, [zero, one], method=Karcher())["w"], one["w"] / 2)
    both = merge_state_dicts(None, [one, other], method=Karcher())["w"]
    assert bool(both.isfinite().all())
    assert float(both.norm()) == pytest.approx(2.0)
    assert torch.allclose(merge_state_dicts(None, [one, other], method=MultiSlerp(origin="zero"))["w"], zero["w"])
    three = weights([1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)])
    with pytest.raises(BadInput, match="w: the models' directions cancel"):
        merge_state_dicts(None, three, method=MultiSlerp(origin="zero"))


def test_models_that_are_the_base_stay_it() -> None:
    base, _ = make_models(1, torch.bfloat16)
    for method in (MultiSlerp(), NuSlerp(), Sce(), Ram()):
        assert torch.equal(flat(merge_state_dicts(base, [base, base], method=method)), flat(base)), method.name
    for method in (NearSwap(), ArceeFusion()):
        assert torch.equal(flat(merge_state_dicts(base, [base], method=method)), flat(base)), method.name


def test_ram_keeps_what_is_alone_and_averages_what_is_shared() -> None:
    base, first, second = weights([0.0] * 4, [1.0, 0.0, 2.0, 1e-6], [0.0, 3.0, 4.0, 0.0])
    assert merge_state_dicts(base, [first, second], method=Ram())["w"].tolist() == [1.0, 3.0, 3.0, 0.0]
    # One shared and one own weight each: rho = 1, limited to 0.2, so 1 + 0.5 * 0.2.
    amplified = merge_state_dicts(base, [first, second], method=Ram(amplify=0.5))["w"]
    assert amplified.tolist() == pytest.approx([1.1, 3.3, 3.0, 0.0])


def test_sce_by_hand() -> None:
    base, first, second = weights([0.0] * 4, [2.0, 1.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0])
    # Energies 5/4 and 2/4: shares 5/7 and 2/7. Signs + +; of the first weight only the first expert agrees.
    assert merge_state_dicts(base, [first, second], method=Sce(density=1.0))["w"].tolist() == pytest.approx(
        [2.0, 1.0, 0.0, 0.0]
    )
    # Only the first weight varies at all, and is selected.
    assert merge_state_dicts(base, [first, second], method=Sce(density=0.99))["w"].tolist() == [0.0] * 4
    wide = weights([0.0] * 4, [2.0, 1.0, 2.5, 0.0], [-1.0, 1.0, 0.0, 0.0])
    assert merge_state_dicts(wide[0], wide[1:], method=Sce(density=0.5))["w"].tolist() == [2.0, 0.0, 0.0, 0.0]


def test_nearswap_moves_no_further() -> None:
    base, expert = weights([0.0, 0.0, 0.0], [0.05, -2.0, 0.5])
    assert merge_state_dicts(base, [expert], method=NearSwap(t=0.1))["w"].tolist() == pytest.approx([0.05, -0.1, 0.1])


@pytest.mark.parametrize(
    ("method", "count"),
    [(Karcher(), 3), (MultiSlerp(), 3), (NuSlerp(along="row"), 2), (Ram(amplify=0.1), 3), (Sce(), 3)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_blocks_change_no_bit(method: Merge, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over blocks are taken in float64, and settled values do not depend on how the stream is cut."""
    base, experts = make_models(count, torch.float32)
    start = base if method.needs_base else None
    whole = merge_state_dicts(start, experts, method=method)
    monkeypatch.setattr("unmergeable.merges.blocks.BLOCK_ELEMENTS", 64)
    cut = merge_state_dicts(start, experts, method=method)
    bound = 4 * torch.finfo(torch.float32).eps * flat(whole).abs() + 1e-6
    assert bool(((flat(cut) - flat(whole)).abs() <= bound).all())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Karcher(iterations=-1), "iterations=-1"),
        (Karcher(tolerance=0.0), "tolerance=0.0"),
        (NuSlerp(t=2.0), "t=2.0"),
        (NearSwap(t=-1.0), "t=-1.0"),
        (Ram(most=float("nan")), "most=nan"),
        (Sce(density=0.0), "density=0.0"),
        (ArceeFusion(width=float("inf")), "width=inf"),
        (DellaLinear(epsilon=0.9), "epsilon=0.9"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_settings_out_of_range_are_refused(method: Merge, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        method.validate()
