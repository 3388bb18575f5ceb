"""Attacks on state dicts and live networks give what attacks on files give, bit for bit."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import unmergeable
from attacks.planted import Build, Network
from rigged import everything
from unmergeable import attacks
from unmergeable.attacks import ATTACKS, OrbitFit, RecoveredWeights
from unmergeable.errors import Mismatch, UsageError
from zoo import TOYS, load_toy

State = dict[str, torch.Tensor]

LEARNS = {"few_shot", "layerwise_ridge", "block_regression", "grad_erase", "distil"}
"""Their functions take a live network and a task."""


@pytest.fixture
def toy(network: Build) -> Network:
    return network("llama")


@pytest.fixture
def protected(toy: Network) -> State:
    return dict(toy.transformed(toy.expert(0.05), toy.key(4.0)).tensors)


def write(toy: Network, tensors: Mapping[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((toy.folder / "config.json").read_bytes())
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


CASES: dict[str, dict[str, Any]] = {
    "nearest_orbit": {"negligible_epsilon": True},
    "canonicalise": {},
    "lossless_pruning": {},
    "kabsch": {},
    "neuron_matching": {},
    "diagonal_ratio": {},
    "revert_to_base": {"tensors": "mlp"},
    "task_vector_rescale": {"scaling_coefficient": 1.5},
    "source_subtraction": {"rescale": False},
    "unmask": {"scaling_coefficient": 0.25},
}


@pytest.mark.parametrize(
    ("name", "is_traded"), [*((name, name == "canonicalise") for name in CASES), ("nearest_orbit", True)]
)
def test_gives_the_bits_of_the_file_path(
    name: str, is_traded: bool, toy: Network, protected: State, tmp_path: Path
) -> None:
    settings = CASES[name]
    if is_traded:
        protected = everything(dict(toy.expert(0.05).tensors), toy.architecture, torch.Generator().manual_seed(1))
    sources = [dict(toy.expert(0.02).tensors)] if "sources" in ATTACKS[name]().requirements().needs else []
    before = {key: tensor.clone() for key, tensor in protected.items()}
    found = getattr(attacks, name)(protected, toy.base.tensors, toy.base.config, sources=sources, **settings)
    result = unmergeable.recover(
        write(toy, protected, tmp_path / "protected"),
        base=str(toy.folder),
        method=name,
        sources=[str(write(toy, source, tmp_path / "source")) for source in sources],
        settings=settings,
        out=str(tmp_path / "out"),
    )

    written = load_file(tmp_path / "out" / "model.safetensors")
    assert found.state_dict.keys() == written.keys()
    assert all(torch.equal(found.state_dict[key], written[key]) for key in written)
    is_changed = any(not torch.equal(protected[key], written[key]) for key in written)
    assert is_changed == (
        name != "lossless_pruning"
    )  # the control: something happened; of structure nothing was hidden
    assert all(torch.equal(before[key], protected[key]) for key in before)
    assert [*found.findings.values()] == [*result.findings.values()]
    if isinstance(found, OrbitFit):
        assert (found.distance, found.distance_before, found.confidence, found.parts) == (
            result.distance_after,
            result.distance_before,
            result.confidence,
            result.parts,
        )
        assert found.distance != found.distance_before
    else:
        assert type(found) is RecoveredWeights


def test_inverts_polynomials_in_memory(network: Build, tmp_path: Path) -> None:
    """The structure is another, so that the base brings its own config."""
    toy = network("vit")
    inputs = TOYS["vit"].inputs(torch.Generator().manual_seed(0))
    np.savez(tmp_path / "data.npz", **{name: tensor.numpy() for name, tensor in inputs.items()})
    release = tmp_path / "release"
    options: dict[str, Any] = {"data": tmp_path / "data.npz", "method": "taylor_mlp", "out": release}
    unmergeable.protect(write(toy, toy.expert(0.05).tensors, tmp_path / "expert"), base=toy.folder, **options)
    tensors = load_file(next(release.glob("*.safetensors")))

    config = json.loads((release / "config.json").read_text())
    found = attacks.taylor_inversion(tensors, toy.base.tensors, config, base_config=toy.base.config)
    unmergeable.recover(release, base=toy.folder, method="taylor_inversion", out=tmp_path / "out")

    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found.state_dict[key], written[key]) for key in written)
    assert found.config == toy.base.config
    reverted = attacks.revert_to_base(tensors, toy.base.tensors, config, base_config=toy.base.config)
    assert reverted.findings["tensors_reverted"] > 0


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_takes_live_networks(name: str, network: Build) -> None:
    """Tied weights under one name, experts cut out of what the network stores as one: as in the files."""
    toy = network(name)
    live = load_toy(toy.folder, TOYS[name], torch.float32)
    fit = attacks.nearest_orbit(live, toy.base.tensors, toy.base.config)
    same = attacks.nearest_orbit(live, live)

    assert set(fit.state_dict) == set(toy.base.tensors)
    assert (fit.distance_before, same.distance_before) == (0, 0)
    moved = toy.transformed(toy.base, toy.key(4.0))
    back = attacks.nearest_orbit(moved.tensors, live, toy.base.config)
    assert back.distance_before > 1
    assert back.distance < 1e-5


def test_distances_are_those_of_parts(toy: Network, protected: State) -> None:
    found = attacks.distances(protected, toy.base.tensors, toy.base.config)
    fit = attacks.nearest_orbit(protected, toy.base.tensors, toy.base.config)

    assert attacks.relative_distance(found) == pytest.approx(fit.distance_before, rel=1e-12)
    assert [(item.block, item.part) for item in found] == [(fit.before.block, fit.before.part) for fit in fit.parts]


def test_every_attack_is_a_function_of_its_name() -> None:
    for name, method in ATTACKS.items():
        function = getattr(attacks, name)
        assert callable(function)
        assert function.__name__ == name
        assert (name in CASES or name == "taylor_inversion") != (name in LEARNS)
        importlib.import_module(f"unmergeable.attacks.{name}")
        assert getattr(attacks, name) is function
        assert all(field.name not in ("protected", "base", "config", "sources") for field in fields(method))


def test_refuses_in_one_line(toy: Network, protected: State) -> None:
    base, config = toy.base.tensors, toy.base.config
    with pytest.raises(UsageError, match="protected: a state dict comes without its config; give it as config="):
        attacks.kabsch(protected, base)
    with pytest.raises(UsageError, match="protected: Linear has no config; give it as config="):
        attacks.kabsch(torch.nn.Linear(2, 2), base)
    with pytest.raises(UsageError, match="has no setting 'negligible'; did you mean 'negligible_epsilon'"):
        attacks.nearest_orbit(protected, base, config, negligible=True)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="kabsch reads no sources"):
        attacks.kabsch(protected, base, config, sources=[base])
    with pytest.raises(UsageError, match="unmask: PROTECTED is the merged model"):
        attacks.unmask(protected, base, config)
    name = next(key for key in base if "q_proj" in key)
    with pytest.raises(Mismatch, match=f"tensor {name} is missing from base; give the base of this checkpoint"):
        attacks.nearest_orbit(protected, {key: t for key, t in base.items() if key != name}, config)
