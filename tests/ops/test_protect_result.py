"""What ``protect`` says on a terminal, for every kind of protection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from unmergeable.errors import NotEquivalent
from unmergeable.ops.protect_result import ProtectResult, StepReport
from unmergeable.protections import Facts, MergeBarrier, MergeGuard, Protection, SensitivityShield, TaylorMLP
from unmergeable.protections.calibration import Approximation, Judgement
from unmergeable.protections.mergeguard.criticality import Criticality
from unmergeable.protections.mergeguard.method import MergeGuardFacts
from unmergeable.protections.polynomial import PolynomialFacts
from unmergeable.protections.sensitivity_shield.method import ShieldFacts

RELEASE, BASE = Path("release"), Path("base")


def told(method: Protection, facts: Facts, *, is_dry_run: bool = False) -> str:
    """What is said of one step without a key."""
    step = StepReport((method.name,), RELEASE, (method.limits,), {"architecture": "llama"}, facts)
    result = ProtectResult(RELEASE, BASE, None, (step,), is_dry_run=is_dry_run, attack=method.attack)
    return "\n".join(result.lines())


def test_a_dry_run() -> None:
    text = told(SensitivityShield(), ShieldFacts(), is_dry_run=True)
    assert "Would protect: release (sensitivity_shield; llama)" in text
    assert "nothing was written" in text
    assert SensitivityShield().limits in text


def test_polynomials() -> None:
    measured = Approximation(output_error=0.00123, outside={"mlp": 0.02, "other": 0.0})
    general = Approximation(output_error=0.3, outside={"mlp": 0.5, "other": 0.1})
    judged = Judgement(20, 900, measured, Approximation(0.04, {"mlp": 0.0, "other": 0.0}), general)
    facts = PolynomialFacts({"mlp": {"largest": 0.25, "median": 0.01}}, judged)
    text = told(TaylorMLP(), facts)
    assert "Calibrated on 20 examples of 900 tokens" in text
    assert "on data it was calibrated on: 1.2e-03 relative" in text
    assert "1.00% of activations, 2.00% in one layer" in text
    assert "on data that was held out: 4.0e-02 relative" in text
    held_out, few, outside = facts.notes
    assert held_out.startswith("Warning: on held-out data the outputs are off by 4.0%")
    assert few.startswith("Warning: it was calibrated on 900 tokens only")
    assert outside.startswith("Warning: on text of other kinds 30% of the activations lie outside")
    fine = Judgement(20, 9000, measured, measured, measured)
    assert fine.warnings() == (), "the control"
    with pytest.raises(NotEquivalent, match=r"off by 0\.60 relative, more than 0\.5: this is another network"):
        replace(fine, held_out=Approximation(0.6, {})).require_bearable("taylor_mlp")
    fine.require_bearable("taylor_mlp")
    assert "trust_remote_code=True" in text
    assert "unmergeable recover release --base base --method taylor_inversion --out release-recovered" in text


def test_heads_alone_are_not_recovered_by_inverting_polynomials() -> None:
    text = told(MergeBarrier(parts="attention"), PolynomialFacts())
    assert "Applying it once more undoes it" in text
    assert "taylor_inversion" not in text
    assert "taylor_inversion" in told(MergeBarrier(), PolynomialFacts()), "control"


def test_the_shield() -> None:
    text = told(SensitivityShield(), ShieldFacts(2_000_000, 750_000, 250_000, (0.3, 0.2, 0.1), ("table",)))
    assert "Siblings mixed into 2,000,000 weights" in text
    assert "750,000 weights in 4 units" in text
    assert "25.0% kept" in text
    assert "1 matrices have no score and stay as they are, such as table" in text
    assert "source_subtraction" in text


def test_mergeguard() -> None:
    accuracies = {"expert": 0.9, "trained": 0.91, "protected": 0.885}
    ranking = Criticality(("layers.3.mlp",), 0.9, {}, {}, examples=10, evaluations=20)
    text = told(MergeGuard(), MergeGuardFacts(10, 4_000_000, (1.0, 0.5), ranking, 400_000, 0.1, accuracies))
    assert "Trained for 2 steps" in text
    assert "400,000 of 4,000,000 weights taken back towards the base" in text
    assert "Left alone: layers.3.mlp" in text
    assert "expert 90.0%, trained 91.0%, protected 88.5%" in text


@pytest.mark.parametrize("is_dry_run", [False, True])
def test_several_steps(is_dry_run: bool) -> None:
    shield = StepReport(("sensitivity_shield",), Path("1"), ("Read this.",), {"architecture": "llama"})
    made = {"architecture": "llama", "key_fingerprint": None if is_dry_run else "0123456789abcdef"}
    exact = StepReport(("mergelock", "params"), RELEASE, ("Read this.", "And this."), made)
    result = ProtectResult(RELEASE, BASE, Path("k"), (shield, exact), is_dry_run)
    text = "\n".join(result.lines())

    assert "release (sensitivity_shield, then mergelock, params; llama)" in text
    assert result.notes == ("Read this.", "And this.")
    assert ("Key: k, not made yet" in text) == ("nothing was written" in text) == is_dry_run
    assert ("it gives what the steps before it made back" in text) == (not is_dry_run)
    assert result.fingerprint == made["key_fingerprint"]
