"""unmask leaves the other expert of a task-arithmetic merge."""

from __future__ import annotations

import pytest
import torch

from attacks.planted import Build
from unmergeable.attacks import Inputs, Unmask
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import UsageError

COEFFICIENT = 0.3


@pytest.mark.parametrize("rescale", [False, True])
def test_leaves_the_other_expert(rescale: bool, network: Build) -> None:
    toy = network("llama")
    release = toy.expert(0.1)
    generator = torch.Generator().manual_seed(8)
    other = {name: 0.01 * torch.randn(base.shape, generator=generator) for name, base in toy.base.tensors.items()}
    merged = {
        name: base + COEFFICIENT * (other[name] + release.tensors[name] - base)
        for name, base in toy.base.tensors.items()
    }
    inputs = Inputs(MemorySource(merged), toy.base, toy.architecture, (release,))
    recovered = Unmask(COEFFICIENT, rescale=rescale).recover(inputs)

    scale = 1 - COEFFICIENT
    for name, base in toy.base.tensors.items():
        expected = scale * base + COEFFICIENT * other[name]
        found = recovered.edits[name](merged[name].clone())
        assert torch.allclose(found, expected / scale if rescale else expected, rtol=0, atol=8 * 2.0**-24 * 10)
        assert not torch.allclose(merged[name], expected, atol=1e-2)  # the control


def test_refuses_what_makes_no_sense(network: Build) -> None:
    toy = network("llama")

    with pytest.raises(UsageError, match="give the protected release it contains as --source"):
        Unmask().recover(Inputs(toy.base, toy.base, toy.architecture))
    with pytest.raises(UsageError, match="a number other than 1"):
        Unmask(scaling_coefficient=1.0).validate()
