"""Whole tensors that change places: traced through several gauges, written from where they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from toy_checkpoints import toy_checkpoint
from unmergeable.architecture.symmetry import Group, Leg, Space, Stack, SymmetryMap
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.rewrite import rewrite
from unmergeable.gauge.act import origins, transform_all
from unmergeable.gauge.elements import Monomial
from unmergeable.gauge.gauge import Gauge, fixed_gauge, sampled_gauge, undo
from unmergeable.gauge.plan import transformed
from unmergeable.randomness import Stream
from zoo import TOYS, write_toy

# Three slices of one tensor [3, 4]: each has a basis of its own, and they change places.
NAMES = ("a", "b", "c")
SPACES = {
    **{f"{name}.order": Space(f"{name}.order", "feed_forward", Group("permutation"), 1, 4) for name in NAMES},
    "experts": Space("experts", "experts", Group("permutation"), 1, 3),
}
STACKED = SymmetryMap(
    SPACES,
    {name: (Leg(f"{name}.order", 0, "vector", 0, 0),) for name in NAMES},
    stacks=(Stack(NAMES, (Leg("experts", 0, "vector", 0, 0),)),),
)
WHOLE = SymmetryMap(
    {**SPACES, "inside": Space("inside", "feed_forward", Group("permutation"), 3, 4)},
    {"stacked": (Leg("inside", 0, "vector", 0, 4), Leg("experts", 0, "vector", 0, 0, 4, ((4, 1),)))},
)


def drawn(seed: int) -> Gauge:
    return sampled_gauge(SPACES, Stream.from_seed(seed), 1.0)


def as_one(gauge: Gauge) -> Gauge:
    """The same change of the stored stack: the three bases inside as blocks of one."""
    inside = torch.cat([gauge.element_of(f"{name}.order").index for name in NAMES])  # type: ignore[attr-defined]
    elements = {"inside": Monomial(inside, torch.ones(3, 4).double()), "experts": gauge.element_of("experts")}
    return Gauge(WHOLE.spaces, elements.__getitem__, gauge.is_inverse)


@pytest.mark.parametrize("inverses", [(False,), (True,), (False, False), (False, True), (True, False), (True, True)])
def test_a_stack_moves_as_the_tensor_it_stands_for(inverses: tuple[bool, ...]) -> None:
    gauges = [drawn(seed).inverse() if inverse else drawn(seed) for seed, inverse in enumerate(inverses)]
    whole = torch.arange(12.0)
    expected = transform_all({"stacked": whole}, WHOLE, [as_one(gauge) for gauge in gauges])["stacked"]
    found = transform_all(dict(zip(NAMES, whole.split(4), strict=True)), STACKED, gauges)
    assert torch.equal(torch.cat([found[name] for name in NAMES]), expected)
    restored = transform_all(found, STACKED, undo(gauges))
    assert torch.equal(torch.cat([restored[name] for name in NAMES]), whole)


def test_origins_follow_several_moves() -> None:
    def turn(*index: int) -> Gauge:
        return fixed_gauge(SPACES, {"experts": Monomial(torch.tensor([index]), torch.ones(1, 3).double())})

    assert origins(STACKED, [turn(1, 2, 0)]) == {"a": "b", "b": "c", "c": "a"}
    assert origins(STACKED, [turn(1, 2, 0), turn(1, 2, 0)]) == {"a": "c", "b": "a", "c": "b"}
    assert origins(STACKED, [turn(1, 2, 0), turn(1, 2, 0).inverse()]) == {}
    assert origins(STACKED, [turn(0, 2, 1), turn(1, 0, 2)]) == {"a": "c", "b": "a", "c": "b"}
    assert origins(STACKED, [sampled_gauge({"a.order": SPACES["a.order"]}, Stream.from_seed(0), 1.0)]) == {}


def test_a_reordered_stack_touches_all_its_members() -> None:
    assert STACKED.tensors_of({"experts"}) == list(NAMES)
    assert STACKED.tensors_of({"b.order"}) == ["b"]


def test_what_is_written_is_what_is_computed_in_memory(tmp_path: Path) -> None:
    """Through files, with experts of which some are only moved and some are changed as well."""
    folder = write_toy(TOYS["deepseek_v3"], tmp_path / "in")
    architecture = toy_checkpoint("deepseek_v3").architecture
    gauge = sampled_gauge(architecture.symmetry.select("experts", "feed_forward"), Stream.from_seed(5), 4.0)
    source = Checkpoint.open(folder)
    plan = transformed(source, architecture.symmetry, [gauge])
    assert any(tensor.origin not in (None, tensor.name) for tensor in plan)
    rewrite(source, tmp_path / "out", plan, manifest={}, resume_token="x")
    before = load_file(folder / "model.safetensors")
    expected = transform_all(before, architecture.symmetry, [gauge])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert list(found) == list(before)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_members_may_be_stored_in_other_dtypes() -> None:
    tensors = {"a": torch.zeros(4), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(4)}
    turn = fixed_gauge(SPACES, {"experts": Monomial(torch.tensor([[1, 0, 2]]), torch.ones(1, 3).double())})
    plan = {tensor.name: tensor for tensor in transformed(MemorySource(tensors), STACKED, [turn])}
    assert [(plan[name].origin, plan[name].spec.dtype) for name in NAMES] == [
        ("b", "BF16"),
        ("a", "F32"),
        (None, "F32"),
    ]
