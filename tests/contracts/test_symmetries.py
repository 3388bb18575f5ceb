"""Every declared symmetry of every family, on the real implementation in float64, and what must not be allowed."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmergeable.architecture import Architecture, Space, detect
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.gauge.act import origins, transform_all
from unmergeable.gauge.elements import Dense, Element, Monomial, Orthogonal, Rotary
from unmergeable.gauge.equivalence import compare
from unmergeable.gauge.gauge import fixed_gauge, sampled_gauge, undo
from unmergeable.gauge.groups import contains, haar, sample
from unmergeable.network.disk_weights import find_places, swapped
from unmergeable.protections import LargestGauge, Weights
from unmergeable.randomness import Stream
from zoo import TOYS, Toy, load_toy, outputs, write_toy

CONDITION = 4.0
ROLES = ("query_key", "value_output", "heads", "feed_forward", "experts", "norm", "residual")
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
    network: Any
    expected: torch.Tensor

    def output_with(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if tensors.keys() <= find_places(self.network).keys():
            with swapped(self.network, tensors):
                return outputs(self.network, self.toy)
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
            network = load_toy(folder, toy, torch.float64)
            cache[name] = Written(toy, folder, tensors, architecture, network, outputs(network, toy))
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

    for role in set(ROLES) - {"heads", "experts"}:  # of those there are so few that some stay where they are
        own = model.architecture.symmetry.select(role)
        touched = model.architecture.symmetry.tensors_of(own)
        alone = sampled_gauge(own, Stream.from_seed(11), CONDITION)
        after = transform_all(model.tensors, model.architecture.symmetry, [alone])
        assert [key for key in touched if torch.equal(after[key], model.tensors[key])] == [], role

    restored = transform_all(moved, model.architecture.symmetry, undo([gauge]))
    for key, tensor in model.tensors.items():
        assert (restored[key] - tensor).abs().max() <= 64 * torch.finfo(torch.float64).eps * CONDITION**2


@pytest.mark.parametrize("name", TOYS)
def test_every_role_moves_the_function_when_only_one_side_follows(name: str, written: Any) -> None:
    """The control: a gauge whose readers do not follow breaks the network, so the test above can fail."""
    model = written(name)
    symmetry = model.architecture.symmetry
    for role in ("query_key", "value_output", "norm", "residual"):
        spaces = symmetry.select(role)  # type: ignore[arg-type]
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


def alternating(space: Space) -> Element:
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(space.size // 2)
    return Monomial(torch.arange(space.size).expand(space.blocks, -1), signs.expand(space.blocks, -1))


# What the symmetries of transformers do not allow, each tried on a network that would show it.
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
    "signs of single coordinates behind a LayerNorm": ("gpt2", "residual", None, alternating),
    "signs of single coordinates in CLIP": ("clip", "residual", None, alternating),
    "signs of single coordinates through the head BERT is tied to": ("bert", "residual", None, alternating),
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


# ------------------------------------------------------------------------------------------ rotations of the stream

ROTATING = ["llama", "llama-classification", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe", "deepseek_v2",
            "deepseek_v3"]  # fmt: skip


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ROTATING)
def test_rms_streams_rotate_between_gains_that_are_folded_and_moved_back(name: str, written: Any) -> None:
    model = written(name)
    symmetry = model.architecture.symmetry
    gauges = LargestGauge().gauges(model.architecture, Stream.from_seed(3), Weights(MemorySource(model.tensors)))
    assert [space for gauge in gauges for space in gauge.spaces if space == "residual.rotation"]
    moved = transform_all(model.tensors, symmetry, gauges)
    assert relative(model.output_with(moved), model.expected) <= TOLERANCE
    gains = {norm.gain for stream in model.architecture.residuals for norm in stream.norms}
    for key, tensor in model.tensors.items():
        if key in gains:  # g . (1 / g) . g is g but for its last digit
            assert (moved[key] - tensor).abs().max() <= 4 * torch.finfo(torch.float64).eps * tensor.abs().max()
    restored = transform_all(moved, symmetry, undo(gauges))
    spread = max(float(model.tensors[gain].abs().max() / model.tensors[gain].abs().min()) for gain in gains)
    for key, tensor in model.tensors.items():
        # A column behind a small gain comes back from among larger ones: their roundings weigh more there.
        assert (restored[key] - tensor).abs().max() <= 512 * torch.finfo(torch.float64).eps * CONDITION**2 * spread


@pytest.mark.parametrize("name", [name for name in TOYS if name not in ROTATING])
def test_every_other_stream_says_why_it_does_not_rotate(name: str, written: Any) -> None:
    architecture = written(name).architecture
    assert not any(space.group.kind == "orthogonal" for space in architecture.symmetry.spaces.values())
    for stream in architecture.residuals:
        assert architecture.symmetry.missing[f"{stream.name}.rotation"]
    if not architecture.residuals:
        assert any(key.endswith("residual") for key in architecture.symmetry.missing)


def rotated_without_gains(model: Written, tensors: dict[str, torch.Tensor]) -> float:
    """A rotation of every stream with gains where they are: what not folding them comes to."""
    legs = {
        key: tuple(leg for leg in every if leg.variance != "gain")
        for key, every in model.architecture.symmetry.legs.items()
    }
    symmetry = replace(model.architecture.symmetry, legs=legs)
    spaces = symmetry.select("residual")
    turns = {key: Orthogonal(haar(1, space.size, Stream.from_seed(5).child(key))) for key, space in spaces.items()}
    found = model.output_with(transform_all(tensors, symmetry, [fixed_gauge(symmetry.spaces, dict(turns))]))
    return relative(found, model.expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt2", "vit", "t5", "bert"])
def test_rotations_without_folding_break_the_network(name: str, written: Any) -> None:
    model = written(name)
    assert rotated_without_gains(model, model.tensors) > 1000 * TOLERANCE


def test_layer_norms_do_not_rotate_even_with_all_gains_at_one(written: Any) -> None:
    """Control and reason: with the same gains an RMS stream does rotate, one behind LayerNorms does not."""
    for name, allowed in (("llama", True), ("gpt2", False)):
        model = written(name)
        gains = {norm.gain for stream in model.architecture.residuals for norm in stream.norms}
        flat = {key: torch.ones_like(tensor) if key in gains else tensor for key, tensor in model.tensors.items()}
        plain = Written(
            model.toy, model.folder, model.tensors, model.architecture, model.network, model.output_with(flat)
        )
        gap = rotated_without_gains(plain, flat)
        assert gap <= TOLERANCE if allowed else gap > 1000 * TOLERANCE


@pytest.mark.parametrize("name", ["gptj", "gpt_neox", "phi", "stablelm", "vit", "clip", "unet-sd15"])
def test_layer_norm_streams_rotate_across_the_mean(name: str, written: Any) -> None:
    """Between folded gains; with a rotation that does not keep the mean, the control, the network breaks."""
    model = written(name)
    symmetry = model.architecture.symmetry
    spaces = {key: s for key, s in symmetry.select("residual", folding=True).items() if s.folded}
    assert {space.group.kind for space in spaces.values()} == {"centred_orthogonal"}
    gains = {
        norm.space: Monomial(
            torch.arange(stream.size)[None], 1 / (model.tensors[norm.gain].double() + norm.offset)[None]
        )
        for stream in model.architecture.residuals
        for norm in stream.norms
        if any(norm.space in space.folded for space in spaces.values())
    }
    fold = fixed_gauge(symmetry.spaces, gains)

    def gap(turns: dict[str, Any]) -> float:
        gauges = [fold, fixed_gauge(symmetry.spaces, turns), fold.inverse()]
        return relative(model.output_with(transform_all(model.tensors, symmetry, gauges)), model.expected)

    stream = Stream.from_seed(3)
    assert gap({key: sample(space, stream.child(key), 1.0) for key, space in spaces.items()}) <= TOLERANCE
    wild = {key: Orthogonal(haar(1, space.size, stream.child(key))) for key, space in spaces.items()}
    assert gap(wild) > 1000 * TOLERANCE


def test_subtracting_the_mean_of_the_embeddings_is_no_symmetry_of_rms_norms(written: Any) -> None:
    model = written("llama")
    changed = dict(model.tensors)
    for axis in model.architecture.residuals[0].axes:
        if axis.variance == "vector":
            tensor = changed[axis.tensor]
            changed[axis.tensor] = tensor - tensor.mean(axis.axis, keepdim=True)
    assert relative(model.output_with(changed), model.expected) > 1000 * TOLERANCE


# ------------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_experts_move_with_their_router_and_not_without(name: str, written: Any) -> None:
    model = written(name)
    symmetry = model.architecture.symmetry
    spaces = symmetry.select("experts")
    gauge = fixed_gauge(symmetry.spaces, {key: reversal(space) for key, space in spaces.items()})
    moved = transform_all(model.tensors, symmetry, [gauge])
    assert relative(model.output_with(moved), model.expected) <= TOLERANCE
    assert all(torch.equal(moved[end], model.tensors[start]) for end, start in origins(symmetry, [gauge]).items())
    for routing in ("gate.weight", "e_score_correction_bias"):
        left = {key: model.tensors[key] if key.endswith(routing) else tensor for key, tensor in moved.items()}
        if any(key.endswith(routing) and ".mlp" in key for key in model.tensors):
            assert relative(model.output_with(left), model.expected) > 100 * TOLERANCE, routing


def test_experts_do_not_leave_their_group(written: Any) -> None:
    model = written("deepseek_v3")
    free = replace(
        model.architecture, mixtures=tuple(replace(mixture, groups=1) for mixture in model.architecture.mixtures)
    )
    space = next(iter(free.symmetry.select("experts").values()))
    across = Monomial(torch.tensor([[2, 1, 0, 3]]), torch.ones(1, 4, dtype=torch.float64))
    gauge = fixed_gauge(free.symmetry.spaces, {space.name: across})
    found = model.output_with(transform_all(model.tensors, free.symmetry, [gauge]))
    assert relative(found, model.expected) > 100 * TOLERANCE


def fused(model: Written) -> Written:
    """The same network with all experts of a layer in two tensors, as transformers holds them in memory."""
    tensors = dict(model.tensors)
    for mixture in model.architecture.mixtures:
        gates, ups, downs = ([tensors.pop(name) for name in stack] for stack in mixture.stacks)
        both = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        tensors[f"{mixture.name}.experts.gate_up_proj"] = torch.stack(both)
        tensors[f"{mixture.name}.experts.down_proj"] = torch.stack(downs)
    config = json.loads((model.folder / "config.json").read_text())
    architecture = detect(config, {key: tuple(value.shape) for key, value in tensors.items()})
    return replace(model, tensors=tensors, architecture=architecture)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_fused_experts_move_with_their_router_and_with_the_stream(name: str, written: Any) -> None:
    model = fused(written(name))
    original = written(name).tensors
    try:
        assert relative(model.output_with(model.tensors), model.expected) <= TOLERANCE  # transformers reads them
        assert model.architecture.symmetry.missing
        gauges = LargestGauge().gauges(model.architecture, Stream.from_seed(3), Weights(MemorySource(model.tensors)))
        moved = transform_all(model.tensors, model.architecture.symmetry, gauges)
        assert relative(model.output_with(moved), model.expected) <= TOLERANCE
        sides = (MemorySource(tensors) for tensors in (model.tensors, moved))
        assert compare(*sides, model.architecture, condition=CONDITION, threads=1, through_streams=True).is_equal
        key = next(key for key in moved if key.endswith("experts.down_proj"))
        swapped = {**moved, key: moved[key].flip(0)}
        assert relative(model.output_with(swapped), model.expected) > 100 * TOLERANCE
        sides = (MemorySource(tensors) for tensors in (model.tensors, swapped))
        assert not compare(*sides, model.architecture, condition=CONDITION, threads=1, through_streams=True).is_equal
    finally:
        (file,) = model.folder.glob("*.safetensors")
        save_file(original, file, metadata={"format": "pt"})
