"""Protect by changing the structure: feed-forwards become polynomials, calibrated on the owner's data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.partial import require_absent
from unmergeable.checkpoint.rewrite import output_like, rewrite
from unmergeable.checkpoint.source import TensorSource
from unmergeable.data import DataSource
from unmergeable.errors import UsageError
from unmergeable.gauge.act import edits
from unmergeable.network.activation_ranges import activation_ranges
from unmergeable.network.encoding import EncodedData, Encoder
from unmergeable.network.load import load_network
from unmergeable.network.polynomial_network import Approximation, approximation, load_polynomial_network
from unmergeable.ops.opened import open_base, open_with_architecture
from unmergeable.ops.workers import one_thread_per_kernel
from unmergeable.polynomials.layout import layout_of
from unmergeable.progress import Progress, silent
from unmergeable.protections import POLYNOMIAL_PROTECTIONS, MergeBarrier
from unmergeable.settings import configure, nearest, settings_of

CALIBRATION_BATCH = 4
CALIBRATION_EXAMPLES = 128

NOTE = (
    "Stops off-the-shelf merging: the projections that a merge would average are not in the file. Does not stop "
    "somebody who knows the method: `recover --method taylor_inversion` solves for them in seconds."
)
ATTENTION_NOTE = (
    "Stops off-the-shelf merging. Does not stop somebody who knows the method: applying it once more undoes it, and no "
    "key is needed for that."
)


@dataclass(frozen=True)
class PolynomialResult:
    """What was (or, in a dry run, would be) written.

    ``errors``: of the polynomials within the calibrated ranges, by feed-forward, in units of the activation.
    ``approximation``: what the written network does on calibration data; None where only heads were changed.
    """

    out: Path
    method: str
    settings: Mapping[str, Any]
    architecture: str
    errors: Mapping[str, Mapping[str, float]]
    approximation: Approximation | None
    note: str
    is_dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "method": self.method,
            "settings": dict(self.settings),
            "architecture": self.architecture,
            "polynomial_errors": {name: dict(error) for name, error in self.errors.items()},
            "approximation": self.approximation.to_json() if self.approximation else None,
            "dry_run": self.is_dry_run,
            "note": self.note,
        }


@one_thread_per_kernel()
def protect_with_polynomials(
    expert: Path,
    *,
    base: Path,
    out: Path,
    method: str,
    data: Path | None = None,
    settings: Mapping[str, object] | None = None,
    examples: int = CALIBRATION_EXAMPLES,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> PolynomialResult:
    """Write ``expert`` with its feed-forwards as polynomials to ``out``, with the code that runs them.

    Args:
        expert: checkpoint folder.
        base: the checkpoint it was fine-tuned from.
        out: folder to create.
        method: taylor_mlp or mergebarrier.
        data: examples of what the network is used for; the ranges of hidden units are taken from them. Needed unless
            only heads are changed (mergebarrier with parts=attention).
        settings: of the method.
        examples: how many of the data to look at, at most.
        dry_run: check everything, write nothing.

    Raises:
        UsageError: an unknown method or setting, or no data.
        BadInput: the checkpoints or the data cannot be used, or ``out`` exists; before anything is computed.
    """
    if method not in POLYNOMIAL_PROTECTIONS:
        raise UsageError(f"no protection by polynomials is called {method!r}{nearest(method, POLYNOMIAL_PROTECTIONS)}")
    protection = configure(POLYNOMIAL_PROTECTIONS[method], settings or {})
    only_heads = isinstance(protection, MergeBarrier) and protection.parts == "attention"
    if data is None and not only_heads:
        raise UsageError(f"{method} is calibrated on data; give some of what the model is used for with data=FILE.")
    if examples < 1:
        raise UsageError(f"{method}: at least one example is needed for calibration, not {examples}.")
    require_absent(out)
    source, architecture = open_with_architecture(expert)
    open_base(base, source, architecture)
    chosen = settings_of(protection)
    recipe = {"method": method, "settings": chosen}
    details = {"kind": "protected", "recipe": recipe, "architecture": architecture.family}
    token = f"polynomials {recipe} {data}"
    if only_heads:
        assert isinstance(protection, MergeBarrier)
        protection.spaces(architecture)  # refuses a setting that does not fit
        if dry_run:
            return PolynomialResult(out, method, chosen, architecture.family, {}, None, ATTENTION_NOTE, is_dry_run=True)
        flipped = edits(architecture.symmetry, [protection.gauge(source, architecture)])
        plan = output_like(source, flipped)
        rewrite(source, out, plan, manifest={**details, "note": ATTENTION_NOTE}, resume_token=token, threads=threads)
        return PolynomialResult(out, method, chosen, architecture.family, {}, None, ATTENTION_NOTE)
    assert data is not None
    if isinstance(protection, MergeBarrier):
        protection.spaces(architecture)  # a setting that does not fit is refused before the network is loaded
    layout_of(architecture)
    batches = iter(EncodedData(DataSource(data, limit=examples), Encoder(expert), CALIBRATION_BATCH))
    first = list(islice(batches, 1))
    if dry_run:
        return PolynomialResult(out, method, chosen, architecture.family, {}, None, NOTE, is_dry_run=True)
    network = load_network(expert)
    ranges = activation_ranges(network, architecture, chain(first, batches), progress=progress)
    planned = protection.rewriting(source, architecture, ranges)
    found: list[Approximation] = []

    def verify(written: TensorSource) -> dict[str, Any]:
        measured = approximation(network, load_polynomial_network(written.folder), first[0])
        found.append(measured)
        return {"measured": measured.to_json()}

    rewrite(
        planned.source,
        out,
        planned.plan,
        manifest={**details, "note": NOTE, "polynomial_errors": planned.errors},
        # Ranges come from the data: the same command on the same data makes the same bytes.
        resume_token=f"{token} {examples} {planned.errors}",
        config_changes=planned.config_changes,
        verify=verify,
        threads=threads,
        progress=progress,
    )
    return PolynomialResult(out, method, chosen, architecture.family, planned.errors, found[0], NOTE)
