"""``unmergeable protect`` with a method that changes the structure of the network: data instead of a key."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unmergeable.errors import UsageError

if TYPE_CHECKING:
    from unmergeable.api.polynomials import PolynomialResult

# Named here and not looked up: the registry lies behind an import of torch.
POLYNOMIAL_METHODS = ("taylor_mlp", "mergebarrier")


def is_polynomial(methods: Sequence[str], data: Path | None, without: Mapping[str, object]) -> bool:
    """Whether the methods asked for are one of these.

    ``without``: options that have no meaning then, by name, with what was given for them.

    Raises:
        UsageError: one of several methods, an option without meaning, or data for a method that reads none.
    """
    named = [name for name in methods if name.strip() in POLYNOMIAL_METHODS]
    if not named:
        if data is not None:
            raise UsageError(f"{','.join(methods)} reads no data: leave out --data.")
        return False
    if len(methods) > 1:
        raise UsageError(
            f"{named[0]} changes the structure of the network and stands alone: protect in two commands, the other "
            "method first."
        )
    for option, given in without.items():
        if given:
            raise UsageError(f"{named[0]} has no key and no dry run: leave out {option}.")
    return True


def describe(result: PolynomialResult, base: Path) -> list[str]:
    """What the owner has to know after protecting."""
    lines = [f"Protected: {result.out} ({result.method}; {result.architecture})"]
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
