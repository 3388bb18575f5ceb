"""Every planted edit is named, and a fine-tune shows no sign of any."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from attacks.planted import Build, Network
from unmergeable.architecture.symmetry import Role
from unmergeable.attacks import NearestOrbit
from unmergeable.attacks.signs import RESET, Sign, find_signs, structure_signs
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.gauge.elements import Element, Monomial
from unmergeable.gauge.gauge import fixed_gauge
from unmergeable.gauge.groups import sample
from unmergeable.randomness import Stream

FAMILIES = ["llama", "bert", "gpt2", "opt", "qwen3", "t5"]


def signs(toy: Network, checkpoint: MemorySource, *sources: MemorySource) -> tuple[Sign, ...]:
    estimate = NearestOrbit().estimate(checkpoint, toy.base, toy.architecture)
    return find_signs(checkpoint, toy.base, toy.architecture, estimate, sources)


def names(toy: Network, checkpoint: MemorySource, *sources: MemorySource) -> list[str]:
    return sorted({sign.name for sign in signs(toy, checkpoint, *sources)})


def edited(toy: Network, source: MemorySource, label: str) -> MemorySource:
    """Attention and feed-forward matrices with an edit; everything else as it is."""
    return MemorySource(
        {name: _EDITS[label](tensor, toy.base.tensors[name]) for name, tensor in source.tensors.items()},
        source.config,
        Path(label),
    )


def _reset_largest(tensor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """MergeGuard's second stage: the tenth of the entries that changed most goes back to the base."""
    change = (tensor - base).abs()
    return torch.where(change > change.flatten().kthvalue(round(0.9 * change.numel())).values, base, tensor)


_EDITS = {
    "reset": _reset_largest,
    "shrunk": lambda tensor, base: 0.95 * tensor if tensor.dim() >= 2 else tensor,
    "pruned to a scale": lambda tensor, base: base + 0.65 * (tensor - base),
}


@pytest.mark.parametrize("share", [0.001, 0.3])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fine_tune_shows_none(name: str, share: float, network: Build) -> None:
    toy = network(name)
    expert = toy.expert(share)

    assert signs(toy, expert) == ()
    in_half = {key: tensor.bfloat16() for key, tensor in expert.tensors.items()}
    base = MemorySource({key: tensor.bfloat16() for key, tensor in toy.base.tensors.items()}, toy.base.config)
    stored = Network(toy.name, toy.folder, base, toy.architecture)
    assert signs(stored, MemorySource(in_half, toy.base.config)) == ()


@pytest.mark.parametrize("name", FAMILIES)
def test_names_a_change_of_basis(name: str, network: Build) -> None:
    toy = network(name)
    expert = toy.expert(0.1)
    # Behind a norm on queries and keys only values and output have a basis to lose.
    assert "gauge" in names(toy, toy.locked(expert, 4.0))
    everything = names(toy, toy.transformed(expert, toy.key(4.0)))
    assert {"gauge", "permutation"} <= set(everything)
    assert ("scaling" in everything) == any(space.endswith(".scale") for space in toy.key(4.0))


def planted(toy: Network, role: Role, kinds: set[str]) -> MemorySource:
    elements: dict[str, Element] = {}
    for name, space in toy.architecture.symmetry.select(role).items():
        if space.group.kind == "permutation" and "permutation" in kinds:
            elements[name] = sample(space, Stream.from_seed(3).child(name), 1.0)
        elif space.group.kind != "permutation" and "scaling" in kinds:
            scale = torch.from_numpy(0.05 + 19.95 * Stream.from_seed(3).child(name).uniform(space.blocks, space.size))
            elements[name] = Monomial(torch.arange(space.size).expand(space.blocks, -1), scale)
    return toy.transformed(toy.expert(0.01), fixed_gauge(toy.architecture.symmetry.spaces, elements))


@pytest.mark.parametrize(
    ("name", "role", "kind"),
    [
        ("bert", "feed_forward", "permutation"),
        ("llama", "feed_forward", "permutation"),
        ("llama", "feed_forward", "scaling"),
        ("opt", "feed_forward", "scaling"),
        ("bert", "value_output", "scaling"),
        ("bert", "heads", "permutation"),
    ],
)
def test_names_what_was_changed_and_nothing_else(name: str, role: Role, kind: str, network: Build) -> None:
    toy = network(name)
    (sign,) = signs(toy, planted(toy, role, {kind}))

    assert (sign.name, sign.recovery) == (kind, "nearest_orbit")
    assert "from the base as stored" in sign.evidence


@pytest.mark.parametrize("name", FAMILIES)
def test_names_edits_of_weights(name: str, network: Build) -> None:
    toy = network(name)
    expert = toy.expert(0.1)

    assert names(toy, edited(toy, expert, "reset")) == ["reset entries"]
    assert names(toy, edited(toy, expert, "shrunk")) == ["shrink"]
    # The control: a scaled task vector is a fine-tune like any other.
    assert names(toy, edited(toy, expert, "pruned to a scale")) == []


def test_counts_reset_entries(network: Build) -> None:
    toy = network("llama")
    (sign,) = signs(toy, edited(toy, toy.expert(0.1), "reset"))

    assert sign.evidence.startswith("10.")
    assert sign.recovery is None
    assert RESET < 0.1


def test_names_siblings_only_when_they_are_in(network: Build) -> None:
    toy = network("llama")
    expert = toy.expert(0.1)
    generator = torch.Generator().manual_seed(9)
    sibling = MemorySource(
        {
            name: base + torch.randn(base.shape, generator=generator) * 0.1 * base.std()
            for name, base in toy.base.tensors.items()
            if base.numel() > 1
        },
        toy.base.config,
        Path("sibling"),
    )
    mixed = {name: 0.7 * expert.tensors[name] + 0.3 * tensor for name, tensor in sibling.tensors.items()}

    (sign,) = signs(toy, MemorySource(mixed, toy.base.config), sibling)
    assert sign.name == "mixture of siblings"
    numel = sum(tensor.numel() for tensor in toy.base.tensors.values())
    (coefficient,) = re.findall(r"0\.\d+", sign.evidence)
    assert float(coefficient) == pytest.approx(0.3, abs=4 / numel**0.5)
    assert signs(toy, expert, sibling) == ()


def test_names_feed_forwards_of_another_structure(network: Build) -> None:
    toy = network("llama")
    changed = {name: tensor for name, tensor in toy.base.tensors.items() if ".mlp.down_proj" not in name}
    changed |= {f"model.layers.{layer}.mlp.coefficients": torch.zeros(3, 48, 80) for layer in range(2)}
    (sign,) = structure_signs(MemorySource(changed), toy.base, toy.architecture)

    assert (sign.name, sign.recovery) == ("polynomial FFN", "revert_to_base")
    assert sign.evidence.startswith("2 of the base's 6 feed-forward tensors are gone or of another shape, and 2 others")
    (described,) = structure_signs(MemorySource(changed, {"polynomial": {}}), toy.base, toy.architecture)
    assert described.recovery == "taylor_inversion"
    reshaped = toy.base.tensors | changed | {"model.layers.0.mlp.down_proj.weight": torch.zeros(3, 80)}
    assert structure_signs(MemorySource(reshaped), toy.base, toy.architecture)[0].name == "polynomial FFN"
    assert structure_signs(toy.base, toy.base, toy.architecture) == []
    assert structure_signs(network("bert").base, toy.base, toy.architecture) == []


def test_an_unrelated_base_says_nothing(network: Build) -> None:
    toy, other = network("bert"), network("bert", seed=1)

    assert names(other, toy.locked(toy.base, 4.0)) == []
