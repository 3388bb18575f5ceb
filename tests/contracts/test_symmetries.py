"""Every declared symmetry of every family, on the real implementation in float64, and what must not be allowed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmergeable.architecture import Architecture, Space, detect
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.elements import Dense, Element, Monomial, Rotary
from unmergeable.gauge.gauge import fixed_gauge, sampled_gauge, undo
from unmergeable.gauge.groups import contains, haar, sample
from unmergeable.randomness import Stream
from zoo import TOYS, Toy, load_toy, outputs, write_toy

CONDITION = 4.0
ROLES = ("query_key", "value_output", "heads", "feed_forward")
# RMS norms, softmax and rotary tables of transformers are computed in float32 whatever the dtype of the weights,
# so that even in float64 two equal functions agree only to some float32 roundings.
TOLERANCE = 16 * torch.finfo(torch.float32).eps


@dataclass
class Written:
    """A toy on disk in float64, its tensors, architecture and output."""

    toy: Toy
    folder: Path
    tensors: dict[str, torch.Tensor]
    architecture: Architecture
    expected: torch.Tensor

    def output_with(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        (file,) = self.folder.glob("*.safetensors")
        save_file(tensors, file, metadata={"format": "pt"})
        try:
            return outputs(load_toy(self.folder, self.toy, torch.float64), self.toy)
        finally:
            save_file(self.tensors, file, metadata={"format": "pt"})

    def gap_after(self, elements: dict[str, Element]) -> float:
        gauge = fixed_gauge(self.architecture.symmetry.spaces, elements)
        found = self.output_with(transform_all(self.tensors, self.architecture.symmetry, [gauge]))
        return float((found - self.expected).norm() / self.expected.norm())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache: dict[str, Written] = {}

    def get(name: str) -> Written:
        if name not in cache:
            toy = TOYS[name]
            folder = write_toy(toy, tmp_path_factory.mktemp(name), dtype=torch.float64)
            (file,) = folder.glob("*.safetensors")
            tensors = load_file(file)
            config = json.loads((folder / "config.json").read_text())
            architecture = detect(config, {key: tuple(value.shape) for key, value in tensors.items()})
            expected = outputs(load_toy(folder, toy, torch.float64), toy)
            cache[name] = Written(toy, folder, tensors, architecture, expected)
        return cache[name]

    return get


@pytest.mark.parametrize("name", TOYS)
def test_every_declared_group_keeps_the_function(name: str, written: Any) -> None:
    model = written(name)
    spaces = model.architecture.symmetry.select(*ROLES)
    gauge = sampled_gauge(spaces, Stream.from_seed(11), CONDITION)
    moved = transform_all(model.tensors, model.architecture.symmetry, [gauge])

    found = model.output_with(moved)
    assert float((found - model.expected).norm() / model.expected.norm()) <= TOLERANCE

    touched = model.architecture.symmetry.tensors_of(spaces)
    assert [key for key in touched if torch.equal(moved[key], model.tensors[key])] == []

    restored = transform_all(moved, model.architecture.symmetry, undo([gauge]))
    for key, tensor in model.tensors.items():
        assert (restored[key] - tensor).abs().max() <= 64 * torch.finfo(torch.float64).eps * CONDITION**2


@pytest.mark.parametrize("name", TOYS)
def test_every_role_moves_the_function_when_only_one_side_follows(name: str, written: Any) -> None:
    """The control: a gauge whose readers do not follow breaks the network, so the test above can fail."""
    model = written(name)
    symmetry = model.architecture.symmetry
    for role in ("query_key", "value_output"):
        spaces = symmetry.select(role)
        gauge = sampled_gauge(spaces, Stream.from_seed(11), CONDITION)
        moved = transform_all(model.tensors, symmetry, [gauge])
        readers = {
            tensor
            for tensor, legs in symmetry.legs.items()
            for leg in legs
            if leg.space in spaces and leg.variance == "covector"
        }
        if not readers or readers >= set(symmetry.tensors_of(spaces)):
            continue  # fused storage: both sides are one tensor, and cannot be separated this way
        half = {key: model.tensors[key] if key in readers else tensor for key, tensor in moved.items()}
        assert not torch.allclose(model.output_with(half), model.expected, rtol=1e-4, atol=1e-6), role


def first(model: Written, role: str, kind: str | None = None) -> Space:
    return next(
        space
        for space in model.architecture.symmetry.select(role).values()  # type: ignore[arg-type]
        if kind is None or space.group.kind == kind
    )


def dense(space: Space, seed: int = 5) -> Element:
    return sample(
        Space(space.name, space.role, type(space.group)("general_linear"), space.blocks, space.size),
        Stream.from_seed(seed),
        CONDITION,
    )


def diagonal(space: Space) -> Element:
    scale = torch.linspace(0.5, 2.0, space.size, dtype=torch.float64).expand(space.blocks, -1)
    return Monomial(torch.arange(space.size).expand(space.blocks, -1), scale)


def reversal(space: Space) -> Element:
    index = torch.arange(space.size).flip(0).expand(space.blocks, -1)
    return Monomial(index, torch.ones(space.blocks, space.size, dtype=torch.float64))


def half_turns(space: Space, pairing: Any) -> Element:
    phases = torch.linspace(0.3, 2.0, space.size // 2, dtype=torch.float64).expand(space.blocks, -1)
    return Rotary(torch.polar(torch.ones_like(phases), phases), pairing)


# What SYMMETRIES of transformers do not allow, each tried on a network that would show it.
FORBIDDEN = {
    "any matrix under rotary positions": ("llama", "query_key", None, dense),
    "an orthogonal matrix under rotary positions": (
        "llama", "query_key", None, lambda space: Dense(haar(space.blocks, space.size, Stream.from_seed(5))),
    ),
    "a diagonal under rotary positions": ("llama", "query_key", None, diagonal),
    "the other pairing of rotary coordinates (half)": (
        "llama", "query_key", None, lambda space: half_turns(space, "interleaved"),
    ),
    "the other pairing of rotary coordinates (interleaved)": (
        "cohere", "query_key", None, lambda space: half_turns(space, "half"),
    ),
    "free phases behind a norm on queries and keys": (
        "qwen3", "query_key", "pair_sign", lambda space: half_turns(space, "half"),
    ),
    "signs behind a LayerNorm on queries and keys": (
        "stablelm-qk-norm", "query_key", "block_sign",
        lambda space: Monomial(
            torch.arange(space.size).expand(space.blocks, -1),
            torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(space.size // 2).expand(space.blocks, -1),
        ),
    ),
    "a scale per pair behind a full-width norm, projections instead of gains": (
        "olmo2", "query_key", "pair_sign", diagonal,
    ),
    "a matrix between rotary and other coordinates": ("gpt_neox", "query_key", "rotary", dense),
    "scales through GELU": ("gpt2", "feed_forward", "permutation", diagonal),
    "scales through a gate": ("llama", "feed_forward", "permutation", diagonal),
    "signs through ReLU": (
        "opt", "feed_forward", "positive_diagonal",
        lambda space: Monomial(
            torch.arange(space.size).expand(space.blocks, -1),
            -torch.ones(space.blocks, space.size, dtype=torch.float64),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("claim", FORBIDDEN)
def test_what_is_not_declared_breaks_the_function(claim: str, written: Any) -> None:
    name, role, kind, make = FORBIDDEN[claim]
    model = written(name)
    space = first(model, role, kind)
    element = make(space)
    if not claim.startswith("a scale per pair"):
        assert not contains(space, element)
    assert model.gap_after({space.name: element}) > 1000 * TOLERANCE


def test_heads_under_alibi_have_their_place(written: Any) -> None:
    model = written("bloom")
    assert not model.architecture.symmetry.select("heads")
    renamed = Architecture(
        model.architecture.family,
        tuple(
            type(block)(**{**block.__dict__, "heads_limit": ""}) if hasattr(block, "heads_limit") else block
            for block in model.architecture.blocks
        ),
    )
    space = next(iter(renamed.symmetry.select("heads").values()))
    gauge = fixed_gauge(renamed.symmetry.spaces, {space.name: reversal(space)})
    found = model.output_with(transform_all(model.tensors, renamed.symmetry, [gauge]))
    assert float((found - model.expected).norm() / model.expected.norm()) > 1000 * TOLERANCE


def test_t5_heads_move_together_or_not_at_all(written: Any) -> None:
    model = written("t5")
    shared = model.architecture.symmetry.select("heads")
    assert "encoder.relative_bias.heads" in shared
    alone = Architecture(model.architecture.family, model.architecture.blocks)  # each layer on its own
    space = next(iter(alone.symmetry.select("heads").values()))
    gauge = fixed_gauge(alone.symmetry.spaces, {space.name: reversal(space)})
    found = model.output_with(transform_all(model.tensors, alone.symmetry, [gauge]))
    assert float((found - model.expected).norm() / model.expected.norm()) > 1000 * TOLERANCE
