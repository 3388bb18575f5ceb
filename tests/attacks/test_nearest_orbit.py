"""nearest_orbit finds a planted key in every kind of family, leaves the function alone, and knows when it cannot."""

from __future__ import annotations

import math
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from attacks.planted import Build, Network
from unmergeable.attacks import Estimate, NearestOrbit
from unmergeable.attacks.distance import parts, relative_distance
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import BadInput, Mismatch
from unmergeable.gauge.act import origins
from unmergeable.gauge.elements import compose
from unmergeable.gauge.equivalence import compare
from unmergeable.gauge.gauge import Gauge, sampled_gauge
from unmergeable.gauge.groups import contains, identity
from unmergeable.randomness import Stream
from unmergeable.settings import configure
from zoo import TOYS, load_toy, outputs

ENDS = (0.001, 0.3)
"""Norm of the planted task vector beside that of the base: what is between the two is easier than one of them."""

COVERING = [
    "llama",
    "gpt2",
    "phi3",
    "gptj",
    "gpt_neox",
    "stablelm",
    "stablelm-qk-norm",
    "cohere",
    "cohere-qk-norm",
    "olmo2",
    "qwen3_moe",
    "deepseek_v3",
    "dinov2",
    "t5",
]
"""Families that have every kind of space, and every way of lying in a tensor, that any family has."""

FAMILIES = [pytest.param(name, marks=[] if name in COVERING else pytest.mark.slow) for name in TOYS]


@dataclass(frozen=True)
class Attempt:
    """An expert, what a planted key made of it, and what was found."""

    expert: MemorySource
    key: tuple[Gauge, ...]
    protected: MemorySource
    estimate: Estimate


Attack = Callable[..., Attempt]


@pytest.fixture(scope="module")
def attack(network: Build) -> Attack:
    """``attack(name, share, condition=4.0)``, each made once; ``whole`` plants a key of streams and norms as well."""

    @cache
    def planted(name: str, share: float, condition: float = 4.0, *, whole: bool = False) -> Attempt:
        toy = network(name)
        expert = toy.expert(share)
        key = (*(toy.stream_key(expert, condition) if whole else ()), toy.key(condition))
        protected = toy.transformed(expert, *key)
        return Attempt(expert, key, protected, NearestOrbit().estimate(protected, toy.base, toy.architecture))

    return planted


@pytest.mark.slow
def test_the_covering_families_have_what_any_has(network: Build) -> None:
    def features(name: str) -> set[tuple[object, ...]]:
        symmetry = network(name).architecture.symmetry
        spaces = NearestOrbit(negligible_epsilon=True).spaces(network(name).architecture)
        kinds = {(space.role, str(space.group), bool(space.folded)) for space in spaces.values()}
        legs = [leg for legs in symmetry.legs.values() for leg in legs]
        return kinds | {
            (
                symmetry.spaces[leg.space].role,
                str(symmetry.spaces[leg.space].group),
                leg.variance,
                leg.offset > 0,
                leg.element_stride > 1,
                bool(leg.spectators),
            )
            for leg in legs
        }

    covered = set().union(*(features(name) for name in COVERING))
    assert {name for name in TOYS if not features(name) <= covered} == set()
    assert not features("t5") <= features("llama")  # the control


@pytest.mark.parametrize(
    ("name", "condition", "shares"),
    [pytest.param(name, 4.0, ENDS, marks=[] if name in COVERING else pytest.mark.slow) for name in TOYS]
    + [(name, 20.0, (0.001, 0.3)) for name in ("llama", "qwen3", "gpt2", "deepseek_v3")],
)
def test_finds_a_planted_key(
    name: str, condition: float, shares: Sequence[float], network: Build, attack: Attack
) -> None:
    toy = network(name)
    for share in shares:
        attempt = attack(name, share, condition)
        estimate, unprotected = attempt.estimate, toy.distance(attempt.expert)

        assert estimate.before == pytest.approx(toy.distance(attempt.protected), rel=1e-9)
        assert estimate.before > 2 * unprotected  # the control: there was something to recover
        assert wrong_places(toy, attempt.key, estimate) == 0
        # The expert is in the orbit, so its nearest point is no further than the expert.
        assert estimate.after <= unprotected * (1 + 1e-6)
        recovered = toy.transformed(attempt.protected, *estimate.gauges)
        assert toy.distance(recovered) == pytest.approx(estimate.after, rel=1e-3)
        # What an adjusted R^2 tends to with an unstructured task vector of this size.
        assert estimate.confidence == pytest.approx(1 - share**2, abs=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_finds_a_planted_key_of_the_whole_network(name: str, network: Build, attack: Attack) -> None:
    """The residual stream and norm gains too: rotated where the architecture allows it."""
    toy = network(name)
    for share in ENDS:
        attempt = attack(name, share, whole=True)
        recovered = toy.transformed(attempt.protected, *attempt.estimate.gauges)

        assert toy.whole_distance(attempt.protected) > 2 * toy.whole_distance(attempt.expert)
        assert wrong_places(toy, attempt.key, attempt.estimate) == 0
        # Rotations and gains are a joint optimum of all weights, found by turns: near the lowest, not at it.
        assert toy.whole_distance(recovered) <= 1.02 * toy.whole_distance(attempt.expert)
        assert attempt.estimate.after <= 1.04 * toy.distance(attempt.expert)


def wrong_places(toy: Network, key: Sequence[Gauge], estimate: Estimate) -> int:
    """How many heads, hidden units and tensors of experts do not come back to the place that ``key`` took them from."""
    symmetry = toy.architecture.symmetry
    wrong = len(origins(symmetry, [*key, *estimate.gauges]))
    for gauge in estimate.gauges:
        for name, space in gauge.spaces.items():
            if space.role in ("heads", "feed_forward") and space.group.kind == "permutation":
                returned = compose(gauge[name], key[-1][name])
                wrong += int((returned.matrix() != identity(space).matrix()).any(2).sum())
    return wrong


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "opt", "mixtral"))]
)
def test_permutations_fail_only_far_from_the_base(name: str, network: Build) -> None:
    """With 80 hidden units on 48 coordinates, from a task vector of about twice the base's norm on."""
    toy = network(name)
    key = toy.key(4.0)
    near, far = (
        NearestOrbit().estimate(toy.transformed(toy.expert(share), key), toy.base, toy.architecture)
        for share in (1.0, 5.0)
    )

    assert wrong_places(toy, [key], near) == 0
    assert wrong_places(toy, [key], far) > 50
    assert min(fit.margin for fit in near.fits if fit.margin is not None) > 0.5
    assert min(fit.margin for fit in far.fits if fit.margin is not None) < 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_every_element_belongs_to_its_group(name: str, network: Build, attack: Attack) -> None:
    toy, estimate = network(name), attack(name, ENDS[-1], whole=True).estimate

    spaces = NearestOrbit().spaces(toy.architecture)
    inside = {name for name, space in spaces.items() if space.role not in ("norm", "residual")}
    assert inside <= {space for gauge in estimate.gauges for space in gauge} <= set(spaces)
    assert all(contains(spaces[space], gauge[space]) for gauge in estimate.gauges for space in gauge)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_compute_the_same(name: str, network: Build, attack: Attack) -> None:
    toy, attempt = network(name), attack(name, ENDS[-1])
    recovered = toy.transformed(attempt.protected, *attempt.estimate.gauges)

    assert compare(attempt.protected, recovered, toy.architecture, condition=attempt.estimate.condition()).is_equal


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "deepseek_v3", "gpt2", "t5"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gptj", "qwen3", "bert", "opt", "gemma", "mixtral", "clip")
        ),
    ],
)
def test_the_network_computes_the_same(name: str, network: Build, tmp_path: Path) -> None:
    toy = network(name)
    expert = toy.expert(0.1)
    protected = toy.transformed(expert, *toy.stream_key(expert, 4.0), toy.key(4.0))
    exact = MemorySource({key: tensor.double() for key, tensor in protected.tensors.items()}, toy.base.config)
    estimate = NearestOrbit().estimate(exact, toy.base, toy.architecture)
    recovered = toy.transformed(exact, *estimate.gauges)
    # The control undoes the gauge on output projections only, which leaves values in another basis.
    is_output = {part.tensors[-1] for part in parts(toy.architecture) if part.name == "value_output"}
    broken = {key: (recovered if key in is_output else exact).tensors[key] for key in exact.tensors}

    def logits(tensors: dict[str, torch.Tensor], folder: str) -> torch.Tensor:
        shutil.copytree(toy.folder, tmp_path / folder)
        save_file(tensors, next((tmp_path / folder).glob("*.safetensors")), {"format": "pt"})
        return outputs(load_toy(tmp_path / folder, TOYS[name], torch.float64), TOYS[name])

    expected = logits(dict(exact.tensors), "protected")
    found, wrong = logits(dict(recovered.tensors), "recovered"), logits(broken, "broken")

    # Weights are float64; some norms and the rotary angles are computed in float32 all the same.
    assert (found - expected).norm() <= 64 * 2.0**-24 * estimate.condition() * expected.norm()
    assert (wrong - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "cohere-qk-norm", "stablelm-qk-norm"])
def test_scales_behind_a_norm_are_found_when_asked(name: str, network: Build) -> None:
    toy = network(name)
    expert = toy.expert(0.01)
    spaces = toy.architecture.symmetry.select("query_key", "value_output", negligible_epsilon=True)
    protected = toy.transformed(expert, sampled_gauge(spaces, Stream.from_seed(1), 9.0))
    unprotected = toy.attention_distance(expert)

    default = NearestOrbit().estimate(protected, toy.base, toy.architecture)
    asked = NearestOrbit(negligible_epsilon=True).estimate(protected, toy.base, toy.architecture)

    assert asked.after <= unprotected * (1 + 1e-6)
    assert default.after > 10 * unprotected


@pytest.mark.parametrize("seed", range(3))
def test_opposite_signs_of_heads_do_not_hide_a_quarter_turn(seed: int, network: Build) -> None:
    toy = network("qwen3")
    expert = toy.expert(0.1)
    estimate = NearestOrbit().estimate(toy.locked(expert, 4.0, seed), toy.base, toy.architecture)

    assert estimate.after <= toy.attention_distance(expert)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
def test_an_unprotected_model_stays_where_it_is(name: str, network: Build) -> None:
    toy = network(name)
    same = NearestOrbit().estimate(toy.base, toy.base, toy.architecture)
    expert = NearestOrbit().estimate(toy.expert(0.01), toy.base, toy.architecture)

    assert same.before == 0
    assert same.after <= 1e-12
    assert expert.after <= expert.before
    orders, bases = expert.gauges  # and none for the stream, which stays untouched
    assert all(torch.equal(orders[space].matrix(), identity(orders.spaces[space]).matrix()) for space in orders)
    for space in bases:
        # A least-squares fit of size^2 numbers to noise of 1 % moves each by about 1 % / sqrt(hidden_size).
        assert (bases[space].matrix() - identity(bases.spaces[space]).matrix()).abs().max() < 0.02


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_wrong_base_explains_no_more_than_chance(name: str, network: Build) -> None:
    toy, other = network(name), network(name, seed=1)
    estimate = NearestOrbit().estimate(toy.locked(toy.base, 4.0), other.base, toy.architecture)

    # size rows span size of hidden_size directions of an unrelated head, on either side.
    size, hidden = 8, 48
    attention = relative_distance(fit.after for fit in estimate.fits if fit.before.part != "feed_forward")
    assert attention > 0.95 * math.sqrt(1 - size / hidden)
    assert estimate.confidence < 0.05
    assert min(fit.margin for fit in estimate.fits if fit.margin is not None) < 0.1


def test_a_model_of_another_family_is_refused(network: Build) -> None:
    bert, vit = network("bert"), network("vit")

    with pytest.raises(Mismatch, match=r"is missing from base; give the base of this checkpoint"):
        NearestOrbit().estimate(bert.base, vit.base, bert.architecture)


def test_confidence_counts_what_was_fitted(network: Build) -> None:
    toy = network("bert")
    estimate = NearestOrbit().estimate(toy.expert(0.1), toy.base, toy.architecture)

    # Two bases for each of 6 heads and one order of 80 hidden units in each of 2 layers.
    assert sum(fit.freedoms for fit in estimate.fits) == 2 * (2 * 6 * 8 * 8 + 80)
    # Fitting p of N numbers leaves (N - p) / N of the squared task vector: undoing that gives back its size.
    assert 1 - estimate.confidence == pytest.approx(0.1**2, rel=0.02)
    assert estimate.after**2 < 0.95 * 0.1**2
    saturated = replace(estimate, fits=tuple(replace(fit, freedoms=fit.after.numel) for fit in estimate.fits))
    assert saturated.confidence == 0


@dataclass(frozen=True)
class CountingSource(MemorySource):
    """Remembers what was read, and how many of its tensors were alive at once."""

    read: list[str] = field(default_factory=list)
    alive: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    peak: list[int] = field(default_factory=lambda: [0])

    def tensor(self, name: str) -> torch.Tensor:
        tensor = super().tensor(name)
        self.read.append(name)
        self.alive[:] = [reference for reference in self.alive if reference() is not None] + [weakref.ref(tensor)]
        self.peak[0] = max(self.peak[0], len(self.alive))
        return tensor


def test_holds_one_part_of_one_block_at_a_time(network: Build) -> None:
    toy = network("bert")
    # Float64 tensors are used as they are read, so that counting them counts what is held.
    source = CountingSource({name: tensor.double() for name, tensor in toy.base.tensors.items()}, toy.base.config)
    NearestOrbit().estimate(source, toy.base, toy.architecture)

    every = parts(toy.architecture)
    # Once to find the orders, once for the distance as found, once for the bases; before that, the embeddings. And
    # three times at most for scales and constants: how far apart, traded or not, keys that are not seen.
    times = Counter(source.read)
    inside = {name for part in every for name in part.tensors}
    assert all(3 <= times[name] <= 6 for name in inside)
    small = {name for name in source.read if source.spec(name).numel <= 80}
    embeddings = {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    assert set(source.read) - inside - small == embeddings
    assert source.peak[0] <= max(len(part.tensors) for part in every)


def test_reports_progress(network: Build) -> None:
    toy = network("bert")
    calls: list[tuple[str, int, int, str]] = []
    NearestOrbit().estimate(toy.base, toy.base, toy.architecture, lambda *call: calls.append(call))

    assert calls == [("matching", done, 4, "permutations") for done in range(1, 5)] + [
        ("estimating", done, 6, "parts") for done in range(1, 7)
    ]


def test_refuses_what_does_not_belong_together(network: Build) -> None:
    toy = network("bert")
    name = "bert.encoder.layer.1.attention.self.key.weight"
    missing = {key: tensor for key, tensor in toy.base.tensors.items() if key != name}
    reshaped = {**toy.base.tensors, name: torch.zeros(48, 47)}
    damaged = {**toy.base.tensors, name: torch.full((48, 48), torch.nan)}
    headless = {key: tensor for key, tensor in toy.base.tensors.items() if not key.startswith("cls.")}

    with pytest.raises(Mismatch, match=f"{name} is missing from in-memory"):
        NearestOrbit().estimate(toy.base, MemorySource(missing), toy.architecture)
    with pytest.raises(Mismatch, match=rf"{name} has shape \[48, 48\] in base but \[48, 47\] in in-memory"):
        NearestOrbit().estimate(toy.base, MemorySource(reshaped), toy.architecture)
    with pytest.raises(BadInput, match=f"{name} of in-memory holds NaN"):
        NearestOrbit().estimate(MemorySource(damaged), toy.base, toy.architecture)
    assert NearestOrbit().estimate(MemorySource(headless), toy.base, toy.architecture).after <= 1e-12


def test_reads_its_setting_from_text() -> None:
    assert configure(NearestOrbit, {"negligible_epsilon": "yes"}) == NearestOrbit(negligible_epsilon=True)
