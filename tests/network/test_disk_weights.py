"""The weights of a live network, found and changed by their names on disk, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmergeable.errors import Mismatch
from unmergeable.network.disk_weights import disk_gradients, find_places, show, swapped
from unmergeable.network.load import load_network
from zoo import TOYS, write_toy


def load_toy(name: str, place: Path) -> tuple[Any, dict[str, Tensor]]:
    folder = write_toy(TOYS[name], place)
    (file,) = folder.glob("*.safetensors")
    return load_network(folder), load_file(file)


def output_of(name: str, network: Any) -> Tensor:
    toy = TOYS[name]
    with torch.no_grad():
        return getattr(network(**toy.inputs(torch.Generator().manual_seed(1))), toy.output)


def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * 1.25 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", TOYS)
def test_other_weights_compute_what_their_checkpoint_does(name: str, tmp_path: Path) -> None:
    """Swapped in, they give the very output of the network that is loaded from their files; then all is as before."""
    network, tensors = load_toy(name, tmp_path)
    before = output_of(name, network)
    assert find_places(network).keys() >= tensors.keys()
    other = changed(tensors)
    with swapped(network, other):
        inside = output_of(name, network)
    assert torch.equal(output_of(name, network), before)
    (file,) = tmp_path.glob("*.safetensors")
    save_file(other, file, {"format": "pt"})
    assert torch.equal(inside, output_of(name, load_network(tmp_path)))
    assert not torch.equal(inside, before)  # control: the weights matter


def test_nothing_is_copied_where_the_dtype_fits(tmp_path: Path) -> None:
    network, tensors = load_toy("llama", tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    other = changed(tensors)
    with swapped(network, other):
        assert network.get_parameter(name).data_ptr() == other[name].data_ptr()
        first = output_of("llama", network)
        other[name].mul_(2)
        assert not torch.equal(output_of("llama", network), first)
    assert network.get_parameter(name).data_ptr() != other[name].data_ptr()
    with swapped(network, {name: other[name].bfloat16()}):  # control: another dtype has to be
        assert network.get_parameter(name).dtype == torch.float32
        assert network.get_parameter(name).data_ptr() != other[name].data_ptr()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "dinov2", "mixtral", "dinov2-swiglu", "gemma"])
def test_gradients_are_those_of_the_tensors_on_disk(name: str, tmp_path: Path) -> None:
    """Along a random direction in the files, the derivative is the scalar product with the gradient."""
    network, tensors = load_toy(name, tmp_path)
    network.double().config._experts_implementation = "eager"  # the grouped kernels do not take float64
    generator = torch.Generator().manual_seed(2)
    direction = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in tensors.items()}
    toy = TOYS[name]

    def loss(step: float) -> Tensor:
        moved = {n: t.double() + step * direction[n] for n, t in tensors.items()}
        show(find_places(network), moved)
        return getattr(network(**toy.inputs(torch.Generator().manual_seed(1))), toy.output).square().mean()

    loss(0.0).backward()
    gradients = disk_gradients(find_places(network))
    derivative = float(sum((gradients[n] * direction[n]).sum() for n in tensors))
    with torch.no_grad():
        step = 1e-4
        slope = float(loss(step) - loss(-step)) / (2 * step)
    # Some norms compute in float32 whatever they are given: the difference of two losses errs by 1e-7 / step = 1e-3 of
    # them. Gradients at the wrong places would have nothing to do with the slope.
    assert abs(slope - derivative) <= 1e-2 * abs(derivative)
    assert abs(derivative) > 1e-3  # control: there is something to agree on


def test_refuses_weights_of_another_network(tmp_path: Path) -> None:
    network, tensors = load_toy("vit", tmp_path)
    before = output_of("vit", network)
    name = next(iter(tensors))
    with (
        pytest.raises(Mismatch, match=r"more.weight: the network has no such tensor"),
        swapped(network, {name: tensors[name] * 2, "more.weight": torch.zeros(1)}),
    ):
        pass
    with (
        pytest.raises(Mismatch, match=rf"{name}: \[7\] where the network has"),
        swapped(network, {name: torch.zeros(7)}),
    ):
        pass
    assert torch.equal(output_of("vit", network), before)


def test_a_plain_module_has_its_own_names() -> None:
    network = torch.nn.Linear(3, 2)
    with swapped(network, {"weight": torch.ones(2, 3)}):
        assert float(network(torch.ones(1, 3)).sum().detach() - network.bias.detach().sum()) == pytest.approx(6)
    assert set(find_places(network)) == {"weight", "bias"}
