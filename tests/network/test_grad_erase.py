"""Gradients projected off a disturbance, while a live network is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from network.small_classifier import Classifier, make_task
from unmergeable.attacks import GradErase
from unmergeable.errors import Mismatch
from unmergeable.network.disk_weights import disk_gradients, find_places
from unmergeable.network.few_shot import few_shot
from unmergeable.network.grad_erase import grad_erase, gradients_projected
from unmergeable.network.load import load_network
from zoo import TOYS, write_toy

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
