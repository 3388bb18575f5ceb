"""task_vector_rescale finds a planted shrink, scales what it is told to, and leaves changes of basis alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attacks.planted import Build, Network
from unmergeable.attacks import Inputs, TaskVectorRescale
from unmergeable.attacks.task_vector_rescale import shrink
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import BadInput, UsageError


def recover(toy: Network, protected: MemorySource, method: TaskVectorRescale) -> dict[str, torch.Tensor]:
    recovered = method.recover(Inputs(protected, toy.base, toy.architecture))
    return {
        name: recovered.edits[name](protected.tensor(name)) if name in recovered.edits else protected.tensor(name)
        for name in protected.names
    }


def matrices(toy: Network) -> list[str]:
    return [name for name, tensor in toy.base.tensors.items() if tensor.dim() >= 2]


@pytest.mark.parametrize("c", [0.0, 0.02, 0.3])
def test_undoes_a_shrink(c: float, network: Build) -> None:
    toy = network("llama")
    expert = toy.expert(0.01)
    shrunk = {name: (1 - c) * expert.tensors[name] for name in expert.tensors}
    protected = MemorySource(shrunk, toy.base.config)
    recovered = recover(toy, protected, TaskVectorRescale())

    for name in matrices(toy):
        base, tensor = toy.base.tensors[name], expert.tensors[name]
        # The task vector's own part along the base: the expected cosine of unrelated vectors is 1 / sqrt(numel).
        along = 4 * 0.01 / base.numel() ** 0.5
        assert shrink(protected, toy.base, name) == pytest.approx(c, abs=along)
        assert (recovered[name] - tensor).norm() <= 2 * along * base.norm()
    assert all(torch.equal(recovered[name], shrunk[name]) for name in shrunk if name not in matrices(toy))


def test_scales_the_task_vector(network: Build) -> None:
    toy = network("llama")
    expert = toy.expert(0.1)
    weak = {name: base + 0.65 * (expert.tensors[name] - base) for name, base in toy.base.tensors.items()}
    method = TaskVectorRescale(scaling_coefficient=1 / 0.65, largest_shrink=0.0)
    recovered = recover(toy, MemorySource(weak, toy.base.config), method)

    for name in matrices(toy):
        assert torch.allclose(recovered[name], expert.tensors[name], atol=8 * 2.0**-24 * 10)
        assert not torch.allclose(weak[name], expert.tensors[name], atol=1e-3)  # the control


def test_a_change_of_basis_is_no_shrink(network: Build) -> None:
    toy = network("bert")
    protected = toy.locked(toy.base, 1.0)
    found = TaskVectorRescale().recover(Inputs(protected, toy.base, toy.architecture)).findings

    assert found["tensors_left"] == 2 * 4
    assert found["mean_shrink"] == pytest.approx(0, abs=1e-6)


def test_refuses_bad_settings_and_numbers(network: Build) -> None:
    toy = network("bert")
    name = matrices(toy)[0]
    damaged = MemorySource(
        {**toy.base.tensors, name: torch.full_like(toy.base.tensors[name], torch.nan)}, {}, Path("x")
    )

    with pytest.raises(UsageError, match="largest_shrink must lie in"):
        TaskVectorRescale(largest_shrink=1.0).validate()
    with pytest.raises(UsageError, match="scaling_coefficient must be finite"):
        TaskVectorRescale(scaling_coefficient=float("nan")).validate()
    with pytest.raises(BadInput, match=f"{name} of x"):
        TaskVectorRescale().recover(Inputs(damaged, toy.base, toy.architecture))
