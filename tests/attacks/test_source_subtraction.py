"""source_subtraction takes planted siblings out of a mixture, and finds none where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attacks.planted import Build, Network
from unmergeable.attacks import Inputs, SourceSubtraction
from unmergeable.attacks.source_subtraction import mixture
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import Mismatch, UsageError


def fine_tune(toy: Network, seed: int, share: float = 0.05) -> MemorySource:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, base in toy.base.tensors.items():
        noise = torch.randn(base.shape, generator=generator)
        tensors[name] = base + noise * (share * base.norm() / noise.norm())
    return MemorySource(tensors, toy.base.config, Path(f"fine-tune-{seed}"))


def mixed(toy: Network, expert: MemorySource, siblings: list[MemorySource], weights: list[float]) -> MemorySource:
    """theta_d + sum_t lambda_t (theta_t - theta_d), the shield's global part."""
    tensors = {}
    for name, tensor in expert.tensors.items():
        others = zip(siblings, weights, strict=True)
        tensors[name] = tensor + sum(weight * (sibling.tensors[name] - tensor) for sibling, weight in others)
    return MemorySource(tensors, toy.base.config, Path("mixture"))


def distance(toy: Network, found: dict[str, torch.Tensor], expert: MemorySource) -> float:
    """Relative to the expert's task vector."""
    away = sum(float((found[name] - expert.tensors[name]).double().square().sum()) for name in found)
    norm = sum(float((expert.tensors[name] - toy.base.tensors[name]).double().square().sum()) for name in found)
    return (away / norm) ** 0.5


def test_takes_siblings_out(network: Build) -> None:
    toy = network("llama")
    expert, siblings = fine_tune(toy, 0), [fine_tune(toy, 1), fine_tune(toy, 2)]
    protected = mixed(toy, expert, siblings, [0.3, 0.05])
    inputs = Inputs(protected, toy.base, toy.architecture, tuple(siblings))
    recovered = SourceSubtraction().recover(inputs)
    found = {name: edit(protected.tensor(name)) for name, edit in recovered.edits.items()}

    # The expert's own task vector has a cosine of about 1 / sqrt(N) with each sibling's.
    numel = sum(tensor.numel() for tensor in toy.base.tensors.values())
    tolerance = 4 / numel**0.5
    assert mixture(protected, siblings, toy.base).tolist() == pytest.approx([0.3, 0.05], abs=tolerance)
    assert recovered.findings["rescaled_by"] == pytest.approx(1 / 0.65, rel=4 * tolerance)
    assert distance(toy, found, expert) <= 4 * tolerance
    assert distance(toy, dict(protected.tensors), expert) > 0.3  # the control


def test_an_expert_of_its_own_stays(network: Build) -> None:
    toy = network("llama")
    expert, sibling = fine_tune(toy, 0), fine_tune(toy, 1)
    recovered = SourceSubtraction().recover(Inputs(expert, toy.base, toy.architecture, (sibling,)))
    found = {name: edit(expert.tensor(name)) for name, edit in recovered.edits.items()}

    assert distance(toy, found, expert) < 0.05


def test_without_rescaling_only_the_siblings_go(network: Build) -> None:
    toy = network("llama")
    expert, sibling = fine_tune(toy, 0), fine_tune(toy, 1)
    protected = mixed(toy, expert, [sibling], [0.4])
    inputs = Inputs(protected, toy.base, toy.architecture, (sibling,))
    recovered = SourceSubtraction(rescale=False).recover(inputs)
    found = {name: edit(protected.tensor(name)) for name, edit in recovered.edits.items()}

    assert recovered.findings["rescaled_by"] == 1
    assert distance(toy, found, expert) == pytest.approx(0.4, abs=0.05)


def test_refuses_sources_that_say_nothing(network: Build) -> None:
    toy = network("llama")
    expert, sibling = fine_tune(toy, 0), fine_tune(toy, 1)

    with pytest.raises(UsageError, match="each with --source"):
        SourceSubtraction().recover(Inputs(expert, toy.base, toy.architecture))
    with pytest.raises(Mismatch, match="not different fine-tunes of this base"):
        SourceSubtraction().recover(Inputs(expert, toy.base, toy.architecture, (sibling, sibling)))
    with pytest.raises(Mismatch, match="not different fine-tunes of this base"):
        SourceSubtraction().recover(Inputs(expert, toy.base, toy.architecture, (toy.base,)))
    with pytest.raises(Mismatch, match="a mixture of the given sources to 100%"):
        SourceSubtraction().recover(Inputs(expert, toy.base, toy.architecture, (expert,)))
