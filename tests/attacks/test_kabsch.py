"""kabsch undoes a rotation wholly, and of a general change of basis only what a rotation can."""

from __future__ import annotations

import math

import pytest
import torch

from attacks.planted import Build, Network
from unmergeable.architecture import Space
from unmergeable.attacks import Kabsch, NearestOrbit
from unmergeable.attacks.moments import dense_moments, leg_pairs, legs_by_space
from unmergeable.gauge.equivalence import compare
from unmergeable.protections.mergelock import MergeLock
from unmergeable.randomness import Stream

EPSILON_32 = 2.0**-24


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_undoes_a_rotation(name: str, network: Build) -> None:
    toy = network(name)
    rotated = Kabsch().estimate(toy.locked(toy.base, 1.0), toy.base, toy.architecture)
    expert = toy.expert(0.1)
    fine_tuned = Kabsch().estimate(toy.locked(expert, 1.0), toy.base, toy.architecture)

    assert rotated.before > 1
    assert rotated.after <= 2 * EPSILON_32  # the protected weights were rounded to float32 once
    assert fine_tuned.after <= toy.attention_distance(expert) * (1 + 1e-6)


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_leaves_what_is_not_a_rotation(name: str, network: Build) -> None:
    toy = network(name)
    protection, stream = MergeLock(condition=20.0), Stream.from_seed(3)
    planted = protection.gauge(toy.architecture, stream)
    protected = toy.transformed(toy.base, planted)

    kabsch = Kabsch().estimate(protected, toy.base, toy.architecture)
    nearest_orbit = NearestOrbit().estimate(protected, toy.base, toy.architecture)

    # ||(R A - 1) W|| >= s_min(W) ||R A - 1||, and over orthogonal R the latter is at least the distance of A's
    # singular values from 1; likewise for U, which carries A^-T.
    base = {key: tensor.double() for key, tensor in toy.base.tensors.items()}
    lowest = 0.0
    for space in protection.spaces(toy.architecture).values():
        singular = torch.linalg.svdvals(planted[space.name].matrix())
        for variance, values in (("vector", singular), ("covector", 1 / singular)):
            weakest = _moments(toy, space, base, variance)
            lowest += float((weakest * (values - 1).square().sum(1)).sum())
    norm = math.hypot(*(fit.after.base_norm for fit in kabsch.fits))
    assert kabsch.after >= math.sqrt(lowest) / norm
    assert math.sqrt(lowest) / norm > 0.1  # the bound says something
    assert nearest_orbit.after <= 1e-3 * kabsch.after


def _moments(toy: Network, space: Space, base: dict[str, torch.Tensor], variance: str) -> torch.Tensor:
    """The smallest squared singular value of what a space's legs of one variance hold, per block."""
    legs = legs_by_space(toy.architecture.symmetry)[space.name]
    pairs = leg_pairs(space, legs, base, base, {})
    return torch.linalg.eigvalsh(dense_moments(space, pairs, variance).base)[:, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bert", "llama", "phi", "qwen3", "stablelm-qk-norm", "deepseek_v3", "olmo2"])
def test_keeps_the_function(name: str, network: Build) -> None:
    toy = network(name)
    protected = toy.locked(toy.expert(0.1), 4.0)
    estimate = Kabsch().estimate(protected, toy.base, toy.architecture)
    recovered = toy.transformed(protected, *estimate.gauges)

    assert estimate.condition() == pytest.approx(1)
    assert estimate.after < estimate.before
    # The protected weights themselves are as badly conditioned as before: a rotation changes nothing about it.
    assert compare(protected, recovered, toy.architecture, condition=4.0).is_equal


def test_a_rotary_phase_is_found_but_not_its_modulus(network: Build) -> None:
    toy = network("llama")
    spaces = toy.architecture.symmetry.select("query_key")
    turned = Kabsch().estimate(toy.locked(toy.base, 1.0), toy.base, toy.architecture)
    scaled = Kabsch().estimate(toy.locked(toy.base, 20.0), toy.base, toy.architecture)

    assert all(turned.gauges[0][space].condition() == pytest.approx(1) for space in spaces)
    assert turned.after <= 2 * EPSILON_32
    assert scaled.after > 0.1
