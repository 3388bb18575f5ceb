"""What is left of a gradient has no part in the disturbance, by itself and while a live network is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from network.small_classifier import Classifier, make_task
from unmergeable.attacks import FewShot, GradErase
from unmergeable.attacks.few_shot import few_shot
from unmergeable.attacks.grad_erase import estimate_disturbance, grad_erase, gradients_projected, project_off
from unmergeable.errors import Mismatch, UsageError
from unmergeable.network.disk_weights import disk_gradients, find_places
from unmergeable.network.load import load_network
from zoo import TOYS, write_toy

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


METHOD = GradErase(samples=12, learning_rates="1e-2", steps=10, batch_size=4)


def start() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in Classifier(1).state_dict().items()}


def directions(weights: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator).to(tensor) for name, tensor in weights.items()}


@pytest.mark.parametrize("toy", ["gpt2", "mixtral"])
def test_gradients_have_no_part_in_the_disturbance(toy: str, tmp_path: Path) -> None:
    """Experts of a mixture are stored in one parameter, and each has its own direction."""
    folder = write_toy(TOYS[toy], tmp_path / "toy")
    network, weights = load_network(folder), load_file(folder / "model.safetensors")
    disturbances = directions(weights)
    places = find_places(network)

    def gradients() -> dict[str, Tensor]:
        network.zero_grad()
        inputs = TOYS[toy].inputs(torch.Generator().manual_seed(0))
        network(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: gradient.double() for name, gradient in disk_gradients(places).items() if name in weights}

    free = gradients()
    with gradients_projected(network, disturbances) as is_trained:
        projected = gradients()
        assert all(is_trained(name) for name, _ in network.named_parameters())
    again = gradients()

    for name, disturbance in disturbances.items():
        direction = disturbance.double() / disturbance.double().norm()
        along = float((projected[name] * direction).sum())
        # float32: the dot product of n numbers, and the difference, are off by n roundings at most.
        bound = 2**-24 * direction.numel() * float(free[name].norm())
        assert abs(along) <= bound
        rest = free[name] - direction * (free[name] * direction).sum()
        assert float((projected[name] - rest).norm()) <= bound
        assert torch.equal(again[name], free[name])  # outside, gradients are free again
    assert any(float((free[n] * d.double()).sum().abs()) > 1e-3 * float(d.norm()) for n, d in disturbances.items())


def test_reset_entries_stay_bit_for_bit() -> None:
    task, weights = make_task(12, 4), start()
    marked = {name: direction > 0 for name, direction in directions(weights).items()}
    found = grad_erase(Classifier(), weights, marked, task, METHOD)
    free = few_shot(Classifier(), weights, task, METHOD.training)
    for name, is_marked in marked.items():
        assert torch.equal(found.weights[name][is_marked], weights[name][is_marked])
        assert not torch.equal(found.weights[name][~is_marked], weights[name][~is_marked])
        assert not torch.equal(free.weights[name][is_marked], weights[name][is_marked])  # the control
    assert found.losses[-1] < found.losses[0]


def test_the_update_nearly_avoids_a_direction() -> None:
    """AdamW scales each weight's step by itself, so that a part of it comes back."""
    task, weights = make_task(12, 4), start()
    name = "inner.weight"
    free = few_shot(Classifier(), weights, task, METHOD.training).weights[name] - weights[name]
    disturbances = {name: free}  # where training would go by itself
    update = grad_erase(Classifier(), weights, disturbances, task, METHOD).weights[name] - weights[name]

    def along(update: Tensor) -> float:
        return float((update * free).sum() / (update.norm() * free.norm()))

    assert along(free) == pytest.approx(1.0)
    assert abs(along(update)) < 0.5
    other = grad_erase(Classifier(), weights, {"inner.bias": torch.ones(5)}, task, METHOD)
    assert other.losses[0] == few_shot(Classifier(), weights, task, METHOD.training).losses[0]


def test_without_a_disturbance_it_is_few_shot() -> None:
    task, weights = make_task(12, 4), start()
    erased = grad_erase(Classifier(), weights, {}, task, METHOD)
    plain = few_shot(Classifier(), weights, task, METHOD.training)
    assert erased.losses == plain.losses
    assert all(torch.equal(erased.weights[name], plain.weights[name]) for name in weights)


def test_refuses_a_disturbance_of_another_network() -> None:
    for name, shape in (("other", (2,)), ("inner.bias", (4,))):
        with pytest.raises(Mismatch, match=f"{name}: no tensor of the network has this name and the shape"):
            grad_erase(Classifier(), start(), {name: torch.ones(shape)}, make_task(12, 4), METHOD)
