"""Families declared by hand as oracles: what is derived for the same network must be all of it, or more."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from toy_checkpoints import toy_checkpoint
from unmergeable.architecture import Architecture, Leg
from unmergeable.architecture.declare import Names
from unmergeable.architecture.derived import DerivedMap, architecture_of
from unmergeable.derivation.build import Specimen, build
from unmergeable.derivation.derive import derive
from unmergeable.derivation.table import tabulate
from zoo import TOYS

FAMILIES = [
    "llama", "llama-bias-tied-mqa", "qwen3", "gemma3", "phi3", "gpt2", "gptj", "gpt_neox", "opt", "bloom",
    "falcon-7b-like", "falcon-40b-like", "stablelm", "cohere-qk-norm", "olmo2", "mixtral", "deepseek_v3", "bert",
    "modernbert", "vit",
]  # fmt: skip
QUICK = ["llama", "qwen3", "gpt_neox", "falcon-40b-like", "deepseek_v3", "bert"]


def specimen(name: str) -> Specimen:
    network = TOYS[name].build()
    return build(network.config.to_dict(), type(network))


@cache
def derived(name: str) -> DerivedMap:
    small = specimen(name)
    found = derive(small)
    return tabulate(str(small.config["model_type"]), type(small.network).__name__, (small, found), (small, found))


def changes(architecture: Architecture, role: str) -> set[tuple[str, frozenset[tuple[str, Leg]]]]:
    """Every group of a role with the places it acts on, whatever its space is called."""
    symmetry = architecture.symmetry
    found = set()
    for name, space in symmetry.select(role).items():  # type: ignore[arg-type]
        legs = {
            (tensor, _places(leg, space.blocks))
            for tensor, own in symmetry.legs.items()
            for leg in own
            if leg.space == name
        }
        found.add((f"{space.group} {space.blocks} {space.size}", frozenset(legs)))
    return found


def _places(leg: Leg, blocks: int) -> Leg:
    return replace(leg, space="", block_stride=leg.block_stride if blocks > 1 else 0)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_the_derived_map_has_every_group_that_the_family_declares(name: str) -> None:
    toy = toy_checkpoint(name)
    found = architecture_of(derived(name), toy.config, Names(toy.shapes))
    for role in ("query_key", "value_output", "heads", "feed_forward"):
        assert changes(toy.architecture, role) - changes(found, role) == set(), role
    assert found.attentions
    assert found.feed_forwards


def test_a_family_of_another_network_has_other_groups() -> None:
    """The control: the comparison above can fail."""
    toy = toy_checkpoint("gpt_neox")
    half = toy_checkpoint("llama")
    found = architecture_of(derived("gpt_neox"), toy.config, Names(toy.shapes))
    assert changes(half.architecture, "query_key") - changes(found, "query_key")
