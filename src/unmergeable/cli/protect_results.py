"""What ``unmergeable protect`` says to the owner, after (or, in a dry run, before) a protection of each kind."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from unmergeable.cli.quantity import COUNT, describe_quantity

if TYPE_CHECKING:
    from unmergeable.ops.exact import ProtectResult
    from unmergeable.ops.mergeguard import MergeGuardResult
    from unmergeable.ops.polynomials import PolynomialResult
    from unmergeable.ops.protection import ComposedResult, Protected
    from unmergeable.ops.sensitivity_shield import ShieldResult

DRY_RUN = "Dry run: nothing was written."

_ROLES = {
    "query_key": "query and key",
    "value_output": "value and output",
    "heads": "order of heads",
    "feed_forward": "feed-forward",
    "experts": "order of experts",
    "norm": "gains of norms",
    "residual": "residual stream",
}


def describe(result: Protected, base: Path) -> list[str]:
    """What the owner has to know after (or, in a dry run, before) protecting, whatever the method."""
    from unmergeable.ops.exact import ProtectResult
    from unmergeable.ops.mergeguard import MergeGuardResult
    from unmergeable.ops.polynomials import PolynomialResult
    from unmergeable.ops.protection import ComposedResult
    from unmergeable.ops.sensitivity_shield import ShieldResult

    if isinstance(result, ProtectResult):
        return describe_exact(result, base)
    if isinstance(result, PolynomialResult):
        return describe_polynomials(result, base)
    if isinstance(result, ShieldResult):
        return describe_shield(result)
    if isinstance(result, MergeGuardResult):
        return describe_mergeguard(result)
    assert isinstance(result, ComposedResult), f"{type(result).__name__} is no result of protect"
    return describe_steps(result)


def describe_exact(result: ProtectResult, base: Path) -> list[str]:
    """After exact methods."""
    steps = ", ".join(str(step["method"]) for step in result.protections)
    changed = f"{result.changed_tensors} of {result.tensors} tensors"
    verb = "Would protect" if result.is_dry_run else "Protected"
    lines = [f"{verb}: {result.out} ({steps}; {changed}; {result.architecture})"]
    lines += [f"  {_ROLES.get(role, role)}: {group}" for role, group in result.groups.items()]
    if result.is_dry_run:
        lines += [f"Key: {result.key}, not made yet"]
        lines += [f"Largest error that rounding may cause in a block: {result.predicted_error:.1e} relative"]
        lines += _left_out(result)
        return [*lines, *result.notes, DRY_RUN]
    lines += [
        f"Key: {result.key} (fingerprint {result.fingerprint[:8]})",
        "  Keep this file, with a backup, and never upload it: it gives the original back to whoever holds it.",
    ]
    assert result.measured_error is not None, "measured whenever something was written"
    lines += [f"Largest error of a block: {result.measured_error:.1e} relative; bound {result.predicted_error:.1e}"]
    if result.logits is not None:
        gap = result.logits
        measured = (
            f"not measured: {gap.reason}" if gap.gap is None else f"{gap.gap:.1e} relative; bound {gap.bound:.1e}"
        )
        lines += [f"Error of the network's output: {measured}"]
    lines += _left_out(result)
    recovered = result.out.with_name(result.out.name + "-recovered")
    command = ["unmergeable", "recover", str(result.out), "--base", str(base), "--method", "nearest_orbit"]
    return [*lines, *result.notes, f"See for yourself: {shlex.join([*command, '--out', str(recovered)])}"]


def _left_out(result: ProtectResult) -> list[str]:
    return [f"Left out: {name} ({reason})" for name, reason in result.left_out]


def describe_polynomials(result: PolynomialResult, base: Path) -> list[str]:
    """After ``taylor_mlp`` or ``mergebarrier``."""
    made = f"{result.out} ({result.method}; {result.architecture})"
    if result.is_dry_run:
        return [f"Would protect: {made}", result.note, DRY_RUN]
    lines = [f"Protected: {made}"]
    if result.approximation is not None:
        measured = result.approximation.to_json()
        largest = max(error["largest"] for error in result.errors.values())
        lines += [
            f"Error of the network's output: {measured['output_error']:.1e} relative, on data it was calibrated on",
            f"Largest error of a hidden unit within the range it was seen in: {largest:.1e}",
            f"Activations outside that range: {measured['outside_mean']:.2%}, {measured['outside_largest']:.2%} in one "
            "layer",
            "It runs its own code: load it with trust_remote_code=True. Measure your task before you publish it.",
        ]
    recovered = result.out.with_name(result.out.name + "-recovered")
    command = ["unmergeable", "recover", str(result.out), "--base", str(base), "--method", "taylor_inversion"]
    see = [f"See for yourself: {shlex.join([*command, '--out', str(recovered)])}"] if result.approximation else []
    return [*lines, result.note, *see]


def describe_shield(result: ShieldResult) -> list[str]:
    """After ``sensitivity_shield``."""
    if result.is_dry_run:
        return [f"Would protect: {result.out} ({result.method}; {result.architecture})", result.note, DRY_RUN]
    lines = [f"Protected: {result.out} ({result.method}; {result.architecture})"]
    if result.mixed:
        lines += [f"  Siblings mixed into {describe_quantity(result.mixed, COUNT)} weights"]
    if result.ranked:
        assert result.excluded is not None, "counted together"
        share = result.excluded / (result.excluded + result.ranked)
        ranked = f"{describe_quantity(result.ranked, COUNT)} weights in {len(result.unit_boundaries) + 1} units"
        lines += [f"  {ranked}, set back to the base and doubled in turns; {share:.1%} kept"]
    if result.unscored:
        lines += [
            f"  {len(result.unscored)} matrices have no score and are not among them, {result.unscored[0]} for one"
        ]
    return [*lines, result.note]


def describe_mergeguard(result: MergeGuardResult) -> list[str]:
    """After ``mergeguard``."""
    made = f"{result.out} ({result.method}; {result.architecture})"
    if result.is_dry_run:
        return [f"Would protect: {made}", result.note, DRY_RUN]
    lines = [f"Protected: {made}"]
    if result.losses:
        lines += [f"  Trained for {len(result.losses)} steps"]
    if result.masked:
        masked, weights = (describe_quantity(count, COUNT) for count in (result.masked, result.weights))
        lines += [f"  {masked} of {weights} weights taken back towards the base"]
    if result.criticality is not None:
        lines += [f"  Left alone: {', '.join(result.criticality.critical)}"]
    accuracies = [f"{name} {value:.1%}" for name, value in (result.accuracies or {}).items()]
    lines += [f"Accuracy on the data: {', '.join(accuracies)}"] if accuracies else []
    return [*lines, result.note]


def describe_steps(result: ComposedResult) -> list[str]:
    """After several steps."""
    verb = "Would protect" if result.is_dry_run else "Protected"
    lines = [f"{verb}: {result.out} ({', then '.join(result.methods)})"]
    if result.key is not None:
        lines += [f"Key: {result.key}{', not made yet' if result.is_dry_run else ''}"]
    if result.key is not None and not result.is_dry_run:
        lines += ["  Keep this file, with a backup, and never upload it. It gives back what the steps before it made."]
    return [*lines, *result.notes, *([DRY_RUN] if result.is_dry_run else [])]
