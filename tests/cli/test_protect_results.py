"""``protect`` with methods that are not exact, or several: what it asks the library for, refuses, and says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from unmergeable.network.criticality import Criticality
from unmergeable.ops.mergeguard import MergeGuardResult
from unmergeable.ops.polynomials import PolynomialResult
from unmergeable.ops.sensitivity_shield import ShieldResult

from unmergeable.cli.protect import KEYLESS_METHODS
from unmergeable.network.polynomial_network import Approximation
from unmergeable.ops.protection import ComposedResult
from unmergeable.protections import POLYNOMIAL_PROTECTIONS, WEIGHT_PROTECTIONS

from .conftest import RecordingOps, Run

REQUEST = ("protect", "expert", "--base", "base", "--out", "release")
RELEASE = Path("release")


def test_the_names_are_those_of_the_registries() -> None:
    assert set(KEYLESS_METHODS) == {*POLYNOMIAL_PROTECTIONS, *WEIGHT_PROTECTIONS}


def test_passes_everything_on(ops: RecordingOps, run: Callable[..., Run]) -> None:
    ops.answer = ShieldResult(RELEASE, "sensitivity_shield", {}, "llama", is_dry_run=True)
    words = "--method mergeguard,sensitivity_shield --data d --head h --encoder e --sibling s --sibling t --seed 3"
    done = run(*REQUEST, *words.split(), "--dry-run")

    assert done.exit_code == 0, done.stderr
    assert {name: ops.options[name] for name in ("method", "data", "head", "encoder", "siblings", "seed")} == {
        "method": ["mergeguard", "sensitivity_shield"],
        "data": Path("d"),
        "head": Path("h"),
        "encoder": Path("e"),
        "siblings": [Path("s"), Path("t")],
        "seed": 3,
    }
    assert "Would protect: release (sensitivity_shield; llama)" in done.stdout
    assert "nothing was written" in done.stdout


def test_polynomials(ops: RecordingOps, run: Callable[..., Run]) -> None:
    measured = Approximation(output_error=0.00123, outside={"mlp": 0.02, "other": 0.0})
    errors = {"mlp": {"largest": 0.25, "median": 0.01}}
    ops.answer = PolynomialResult(RELEASE, "taylor_mlp", {}, "llama", errors, measured, "Does not stop everybody.")
    done = run(*REQUEST, "--method", "taylor_mlp", "--data", "mine.jsonl")

    assert "1.2e-03 relative" in done.stdout
    assert "1.00%, 2.00% in one layer" in done.stdout
    assert "trust_remote_code=True" in done.stdout
    assert "unmergeable recover release --base base --method taylor_inversion --out release-recovered" in done.stdout


def test_the_shield(ops: RecordingOps, run: Callable[..., Run]) -> None:
    ops.answer = ShieldResult(
        RELEASE,
        "sensitivity_shield",
        {},
        "llama",
        is_dry_run=False,
        mixed=2_000_000,
        ranked=750_000,
        excluded=250_000,
        unit_boundaries=(0.3, 0.2, 0.1),
    )
    done = run(*REQUEST, "--method", "sensitivity_shield", "--sibling", "s")

    assert "Siblings mixed into 2.0 million weights" in done.stdout
    assert "750.0 thousand weights in 4 units" in done.stdout
    assert "25.0% kept" in done.stdout
    assert "source_subtraction" in done.stdout


@pytest.mark.parametrize("is_dry_run", [False, True])
def test_several_steps(is_dry_run: bool, ops: RecordingOps, run: Callable[..., Run]) -> None:
    methods = ("sensitivity_shield", "mergelock,params")
    ops.answer = ComposedResult(RELEASE, Path("k"), methods, ({}, {}), ("Read this.",), is_dry_run)
    done = run(*REQUEST, "--method", "sensitivity_shield,mergelock,params", "--sibling", "s")

    assert "release (sensitivity_shield, then mergelock,params)" in done.stdout
    assert "Read this." in done.stdout
    assert ("Key: k, not made yet" in done.stdout) == ("nothing was written" in done.stdout) == is_dry_run
    assert ("gives back what the steps before it made" in done.stdout) == (not is_dry_run)


def test_mergeguard(ops: RecordingOps, run: Callable[..., Run]) -> None:
    accuracies = {"expert": 0.9, "trained": 0.91, "protected": 0.885}
    ranking = Criticality(("layers.3.mlp",), 0.9, {}, {}, examples=10, evaluations=20)
    ops.answer = MergeGuardResult(
        RELEASE, "mergeguard", {}, "llama", 10, 4_000_000, False, (1.0, 0.5), ranking, 400_000, 0.1, accuracies
    )
    done = run(*REQUEST, "--method", "mergeguard", "--data", "d")

    assert "Trained for 2 steps" in done.stdout
    assert "400.0 thousand of 4.0 million weights taken back towards the base" in done.stdout
    assert "Left alone: layers.3.mlp" in done.stdout
    assert "expert 90.0%, trained 91.0%, protected 88.5%" in done.stdout


@pytest.mark.parametrize("option", [("--key", "k"), ("--passphrase",)])
def test_a_key_where_none_is_made_is_refused(
    option: tuple[str, ...], ops: RecordingOps, run: Callable[..., Run]
) -> None:
    done = run(*REQUEST, "--method", "mergebarrier", *option)

    assert done.exit_code == 2
    assert f"mergebarrier makes no key: leave out {option[0]}" in done.stderr
    assert not ops.calls
