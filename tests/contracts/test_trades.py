"""Exact rewrites that are no change of basis: verify calls them equal, and an attacker with the base undoes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attacks.planted import Network
from rigged import REWRITES, Rigged, everything
from unmergeable import ops
from unmergeable.architecture import detect
from unmergeable.attacks import Canonicalise, Inputs, NearestOrbit
from unmergeable.attacks.signs import find_signs
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.gauge.additive import Neutral, freedoms_of
from zoo import TOYS, load_toy, outputs, write_toy

TOLERANCE = 64 * torch.finfo(torch.float32).eps
"""Norms, softmax and rotary tables of transformers are computed in float32; what is traded is many times larger."""

COVERING = (
    "llama-bias-tied-mqa", "phi", "gpt2", "opt-350m-like", "falcon-40b-like", "mixtral", "bert-embedding", "dinov2",
    "dinov2-swiglu", "clip", "t5", "unet-sd15",
)  # fmt: skip
QUICK = ("llama-bias-tied-mqa", "phi", "gpt2", "opt-350m-like", "mixtral", "bert-embedding", "dinov2", "clip")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TOYS]

# Norms before blocks with a layer scale, norms behind blocks in a stream that is given out, experts behind RMS norms.
ATTACKED = [
    *("dinov2", "bert-embedding", "mixtral"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("phi", "t5", "llama")),
]

WHERE = {
    "value_bias": {"phi", "gpt2", "bert-embedding", "dinov2", "clip", "llama-bias-tied-mqa", "falcon-40b-like"},
    "key_bias": {"phi", "gpt2", "opt-350m-like", "bert-embedding", "dinov2", "clip"},
    "norm_bias": {"phi", "gpt2", "opt-350m-like", "bert-embedding", "dinov2", "dinov2-swiglu", "clip", "unet-sd15"},
    "norm_gain": set(COVERING) - {"opt-350m-like", "bert-embedding"},
    "layer_scale": {"dinov2", "dinov2-swiglu"},
    "unseen_reading": {"phi", "gpt2", "opt-350m-like", "bert-embedding", "dinov2", "clip", "unet-sd15"},
    "unseen_writing": {"phi", "gpt2", "opt-350m-like", "bert-embedding", "dinov2", "dinov2-swiglu", "clip"},
    "router": {"mixtral"},
    "summed_rows": {"phi", "bert-embedding", "dinov2", "dinov2-swiglu", "clip"},
    "position_bias": {"t5"},
    "extreme_scales": set(COVERING),
}
"""Some of the families in which each rewrite exists."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A toy in float64 with its live output, and its expert's attack problem in float32."""

    name: str
    network: Network
    exact: State
    expected: Tensor

    def output(self, tensors: State) -> Tensor:
        (file,) = self.network.folder.glob("*.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
        return outputs(load_toy(self.network.folder, TOYS[self.name], torch.float64), TOYS[self.name])

    def gap(self, tensors: State) -> float:
        return float((self.output(tensors) - self.expected).norm() / self.expected.norm())

    def rigged(self, rewrite: str, tensors: State | None = None) -> Rigged:
        tensors = self.exact if tensors is None else tensors
        return REWRITES[rewrite](tensors, self.network.architecture, torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    @cache
    def build(name: str) -> Model:
        folder = write_toy(TOYS[name], tmp_path_factory.mktemp(name), dtype=torch.float64)
        tensors = load_file(next(folder.glob("*.safetensors")))
        config = json.loads((folder / "config.json").read_text())
        architecture = detect(config, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        base = MemorySource({key: tensor.float() for key, tensor in tensors.items()}, config, Path("base"))
        expected = outputs(load_toy(folder, TOYS[name], torch.float64), TOYS[name])
        return Model(name, Network(name, folder, base, architecture), tensors, expected)

    return build


def neutral(model: Model, tensors: State) -> State:
    source = Neutral(MemorySource(tensors), freedoms_of(model.network.architecture, tensors))
    return {name: source.tensor(name) for name in tensors}


@pytest.mark.parametrize("name", EVERY)
def test_every_rewrite_keeps_the_function_and_the_neutral_form(name: str, model: Callable[[str], Model]) -> None:
    toy = model(name)
    form = neutral(toy, toy.exact)
    assert toy.gap(form) <= TOLERANCE
    for rewrite in REWRITES:
        rigged = toy.rigged(rewrite)
        assert rigged is not None or name not in WHERE[rewrite]
        if rigged is None:
            continue
        changed, half = rigged
        assert toy.gap(changed) <= TOLERANCE, rewrite
        assert toy.gap(half) > 1e-4, rewrite  # the control: one half of it is another function
        if rewrite != "extreme_scales":  # a change of basis
            for key, tensor in neutral(toy, changed).items():
                assert (tensor - form[key]).abs().max() <= 1e-12 * (1 + form[key].abs().max()), (rewrite, key)
            assert any(not torch.allclose(tensor, form[key]) for key, tensor in neutral(toy, half).items()), rewrite


@pytest.mark.parametrize("name", ATTACKED)
def test_an_attacker_with_the_base_undoes_every_rewrite(name: str, model: Callable[[str], Model]) -> None:
    toy = model(name)
    network = toy.network
    expert = network.expert(0.1)
    exact = {key: tensor.double() for key, tensor in expert.tensors.items()}
    every = {rewrite: rigged[0] for rewrite in REWRITES if (rigged := toy.rigged(rewrite, exact)) is not None}
    every["everything"] = everything(exact, network.architecture, torch.Generator().manual_seed(1))
    for rewrite, tensors in every.items():
        rigged_source = MemorySource({key: tensor.float() for key, tensor in tensors.items()}, expert.config)
        locked = network.transformed(rigged_source, network.key(4.0))
        for protected in (rigged_source, locked):
            estimate = NearestOrbit().estimate(protected, network.base, network.architecture)
            recovered = network.transformed(_tensors(estimate.template or protected), *estimate.gauges)
            if rewrite not in ("router", "summed_rows", "position_bias"):  # which are in no part of a block
                assert network.distance(protected) > 1.5 * network.distance(expert), rewrite
            assert network.distance(recovered) <= 1.02 * network.distance(expert), rewrite
            assert network.distance(recovered) == pytest.approx(estimate.after, rel=1e-3), rewrite
            if rewrite in ("summed_rows", "position_bias"):
                assert network.whole_distance(protected) > 1.5 * network.whole_distance(expert), rewrite
                assert network.whole_distance(recovered) <= 1.02 * network.whole_distance(expert), rewrite


@pytest.mark.parametrize("name", ["dinov2", "bert-embedding", "mixtral"])
def test_what_is_undone_computes_the_same(name: str, model: Callable[[str], Model]) -> None:
    toy = model(name)
    network = toy.network
    exact = {key: tensor.double() for key, tensor in network.expert(0.1).tensors.items()}
    toy = replace(toy, expected=toy.output(exact))
    tensors = everything(exact, network.architecture, torch.Generator().manual_seed(1))
    locked = network.transformed(MemorySource(tensors, network.base.config), network.key(4.0))
    estimate = NearestOrbit().estimate(locked, network.base, network.architecture)
    assert estimate.template is not None
    recovered = network.transformed(_tensors(estimate.template), *estimate.gauges)
    assert toy.gap(dict(recovered.tensors)) <= TOLERANCE
    found = Canonicalise().recover(Inputs(MemorySource(tensors), network.base, network.architecture))
    assert toy.gap(dict(_tensors(found.template).tensors)) <= TOLERANCE


@pytest.mark.parametrize("name", ATTACKED)
def test_fine_tunes_and_changes_of_basis_show_no_trace(name: str, model: Callable[[str], Model]) -> None:
    network = model(name).network
    expert = network.expert(0.1)
    for source in (network.base, expert, network.transformed(expert, network.key(4.0))):
        result = Canonicalise().recover(Inputs(source, network.base, network.architecture))
        assert result.findings == {"traces": "none"}
        assert result.template is source
        assert NearestOrbit().estimate(source, network.base, network.architecture).template is None


def test_traces_are_signs_of_a_protection(model: Callable[[str], Model]) -> None:
    network = model("dinov2").network
    expert = network.expert(0.1)
    exact = {key: tensor.double() for key, tensor in expert.tensors.items()}
    signs = {}
    for kind in ("value_bias", "layer_scale", None):
        rigged = None if kind is None else model("dinov2").rigged(kind, exact)
        tensors = exact if rigged is None else rigged[0]
        source = MemorySource({key: tensor.float() for key, tensor in tensors.items()}, expert.config)
        estimate = NearestOrbit().estimate(source, network.base, network.architecture)
        signs[kind] = find_signs(source, network.base, network.architecture, estimate)
    assert [(sign.name, sign.recovery) for sign in signs["value_bias"]] == [("traded constants", "nearest_orbit")]
    assert "value bias" in signs["value_bias"][0].evidence
    assert "layer scale" in signs["layer_scale"][0].evidence
    assert signs[None] == ()


def test_two_added_tokens_do_not_blind_the_attack(model: Callable[[str], Model]) -> None:
    network = model("llama").network
    expert = network.expert(0.1)
    added = {"model.embed_tokens.weight", "lm_head.weight"}
    grown = {key: torch.cat([tensor, tensor[:2]]) if key in added else tensor for key, tensor in expert.tensors.items()}
    architecture = detect(expert.config, {key: tuple(tensor.shape) for key, tensor in grown.items()})
    larger = replace(network, architecture=architecture)
    source = MemorySource(grown, expert.config)
    protected = larger.transformed(source, *larger.stream_key(source, 4.0), larger.key(4.0))
    estimate = NearestOrbit().estimate(protected, network.base, architecture)
    assert estimate.before > 1
    assert estimate.after <= 1.02 * network.distance(expert)


def test_what_explains_nothing_is_no_recovery(model: Callable[[str], Model]) -> None:
    network = model("bert-embedding").network
    generator = torch.Generator().manual_seed(1)
    other = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in network.base.tensors.items()}
    for source, status in ((MemorySource(other), "not recognised"), (network.expert(0.1), None)):
        found = NearestOrbit().recover(Inputs(source, network.base, network.architecture)).findings
        assert str(found.get("result")).startswith(str(status))


@pytest.mark.parametrize("name", ATTACKED)
def test_verify_calls_equal_what_is_equal_and_no_more(name: str, model: Callable[[str], Model], tmp_path: Path) -> None:
    toy = model(name)
    expert = write_toy(TOYS[name], tmp_path / "expert")
    exact = {key: tensor.double() for key, tensor in load_file(next(expert.glob("*.safetensors"))).items()}

    def difference(tensors: State, folder: str) -> str:
        """Why they are not equal."""
        other = write_toy(TOYS[name], tmp_path / folder)
        kept = {key: tensor.float().contiguous() for key, tensor in tensors.items()}
        save_file(kept, next(other.glob("*.safetensors")), {"format": "pt"})
        result = ops.verify(expert, other)
        return "" if result.is_equal else result.explain()

    for rewrite in REWRITES:
        rigged = toy.rigged(rewrite, exact)
        if rigged is not None:
            assert difference(rigged[0], rewrite) == "", rewrite
            assert difference(rigged[1], f"half-{rewrite}") != "", rewrite
    assert difference(everything(exact, toy.network.architecture, torch.Generator().manual_seed(1)), "everything") == ""


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_verify_tells_two_percent_of_noise_from_rounding_in_half_precision(name: str, tmp_path: Path) -> None:
    expert = write_toy(TOYS[name], tmp_path / "expert", dtype=torch.bfloat16)
    stored = load_file(next(expert.glob("*.safetensors")))
    release = tmp_path / "release"
    base = write_toy(TOYS[name], tmp_path / "base", seed=1, dtype=torch.bfloat16)
    ops.protect(expert, base=base, method="gauge", out=release, seed=1)
    assert ops.verify(expert, release).is_equal
    for index, start in enumerate((stored, load_file(next(release.glob("*.safetensors"))))):
        generator = torch.Generator().manual_seed(3)
        noisy = {
            key: (tensor.float() * (1 + 0.02 * torch.randn(tensor.shape, generator=generator))).bfloat16()
            for key, tensor in start.items()
        }
        other = write_toy(TOYS[name], tmp_path / f"noisy{index}", dtype=torch.bfloat16)
        save_file(noisy, next(other.glob("*.safetensors")), {"format": "pt"})
        assert not ops.verify(expert, other).is_equal


def _tensors(source: object) -> MemorySource:
    return MemorySource({name: source.tensor(name) for name in source.names}, source.config)  # type: ignore[attr-defined]
