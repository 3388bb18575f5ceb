"""What is left of a gradient has no part in the disturbance, and is all of the rest."""

from __future__ import annotations

import pytest
import torch

from unmergeable.attacks import FewShot, GradErase
from unmergeable.attacks.grad_erase import estimate_disturbance, project_off
from unmergeable.errors import UsageError

SHAPE = (5, 7)


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_is_at_right_angles_to_a_direction() -> None:
    gradient, direction = drawn(0), drawn(1)
    left = project_off(gradient, direction)
    bound = 2**-53 * 100 * float(gradient.norm() * direction.norm())
    assert abs(float((left * direction).sum())) <= bound < abs(float((gradient * direction).sum()))
    taken = gradient - left
    assert float((taken / direction).std()) <= 1e-12  # along the direction and nowhere else
    assert torch.equal(project_off(gradient, torch.zeros(SHAPE)), gradient)
    assert torch.allclose(project_off(gradient, 1000 * direction), left, rtol=0, atol=1e-13)


def test_marked_entries_vanish_and_others_stay() -> None:
    gradient, is_marked = drawn(0), drawn(1) > 0.5
    left = project_off(gradient, is_marked)
    assert not left[is_marked].any()
    assert torch.equal(left[~is_marked], gradient[~is_marked])
    assert 0 < int(is_marked.sum()) < is_marked.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_estimates_come_from_the_release_and_the_base(dtype: torch.dtype) -> None:
    """MergeGuard's second stage with beta = 1 puts the base's values back, bit for bit."""
    base, tuned = drawn(0, dtype), drawn(1, dtype)
    is_reset = drawn(2) > 0.5
    release = torch.where(is_reset, base, tuned)
    assert torch.equal(estimate_disturbance(release, base, "reset_entries"), is_reset)
    direction = estimate_disturbance(release, base, "task_vector")
    assert direction.dtype == torch.float32
    assert torch.equal(direction, release.float() - base.float())
    assert not direction[is_reset].any()


def test_trains_as_few_shot_does() -> None:
    method = GradErase(samples=7, learning_rates="1e-3", steps=3, batch_size=2, seed=9)
    assert method.training == FewShot(samples=7, learning_rates="1e-3", steps=3, batch_size=2, seed=9)
    assert GradErase().training == FewShot()
    with pytest.raises(UsageError, match="steps=0"):
        GradErase(steps=0).validate()
