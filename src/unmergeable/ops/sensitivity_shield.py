"""Protect with the sensitivity shield: siblings mixed in, the task vector taken away and doubled in turns.

Three passes over the files besides the network's two over the data: the first finds the threshold of every row and
counts the leading digits of every magnitude, the second counts the digits that settle the boundaries of all units, the
third writes. Between them only thresholds (a number per row) and boundaries are kept.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.partial import require_absent
from unmergeable.checkpoint.rewrite import output_like, rewrite
from unmergeable.checkpoint.source import TensorSource
from unmergeable.data import DataSource
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.network.disk_weights import find_places, show
from unmergeable.network.encoding import EncodedData, Encoder
from unmergeable.network.input_norms import input_norms
from unmergeable.network.load import load_network
from unmergeable.ops.opened import open_base, open_with_architecture
from unmergeable.ops.workers import one_thread_per_kernel, worker_threads
from unmergeable.progress import Progress, silent
from unmergeable.protections.sensitivity_shield import (
    Boundaries,
    InputNorms,
    Sensitivity,
    SensitivityShield,
    Shield,
    first_digits,
)
from unmergeable.randomness import Stream
from unmergeable.settings import configure, settings_of

CALIBRATION_BATCH = 4

NOTE = (
    "Changes the function: measure the release on its own task. Does not stop somebody who holds the siblings: "
    "`recover --method source_subtraction` finds how much of each is mixed in."
)


@dataclass(frozen=True)
class ShieldResult:
    """What was (or, in a dry run, would be) written. Counts are of weights, None in a dry run.

    ``mixed``: in tensors that siblings were mixed into. ``ranked``: in units. ``excluded``: in the same tensors, kept
    for being sensitive (or drawn, by ``exclusion=random``). ``unit_boundaries``: of |tau_G|, largest first.
    ``unscored``: matrices of attention and feed-forwards that are no linear layers, so that nothing is known of them.
    """

    out: Path
    method: str
    settings: Mapping[str, Any]
    architecture: str
    is_dry_run: bool
    mixed: int | None = None
    ranked: int | None = None
    excluded: int | None = None
    unit_boundaries: tuple[float, ...] = ()
    unscored: tuple[str, ...] = ()
    note: str = NOTE

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "method": self.method,
            "settings": dict(self.settings),
            "architecture": self.architecture,
            "dry_run": self.is_dry_run,
            "mixed_weights": self.mixed,
            "ranked_weights": self.ranked,
            "excluded_weights": self.excluded,
            "unit_boundaries": list(self.unit_boundaries),
            "unscored_tensors": list(self.unscored),
            "note": self.note,
        }


def protect_with_shield(
    expert: Path,
    *,
    base: Path,
    out: Path,
    siblings: Sequence[Path] = (),
    data: Path | None = None,
    encoder: Path | None = None,
    settings: Mapping[str, object] | None = None,
    seed: int = 0,
    threads: int | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> ShieldResult:
    """Write ``expert`` under the sensitivity shield to ``out``.

    Tensors that base or siblings lack or hold in another shape (heads of other tasks) stay the expert's. What the
    siblings are is the owner's secret: neither they nor their coefficients are named in the manifest.

    Args:
        expert: checkpoint folder, or a LoRA folder to be merged into ``base`` first.
        base: the checkpoint it was fine-tuned from.
        out: folder to create.
        siblings: other fine-tunes of the base, in the order of ``coefficients``; the first perturbs G1. Folders like
            ``expert``.
        data: examples of the expert's domain; needed where weights are scored (not by parts=global, nor by
            exclusion=random or none).
        encoder: folder whose tokenizer or image processor prepares the data; None for the expert's.
        settings: of ``sensitivity_shield``.
        seed: of exclusion=random.
        dry_run: check everything, write nothing.

    Raises:
        UsageError: a setting, or data or siblings that are missing or of no use.
        BadInput: the checkpoints or the data cannot be used, or ``out`` exists; before anything is computed.
        Mismatch: a sibling is no fine-tune of the same base; the message names the tensor.
    """
    shield = configure(SensitivityShield, settings or {})
    _require_request(shield, siblings, data)
    require_absent(out)
    source, architecture = open_with_architecture(expert, base=base)
    origin = open_base(base, source, architecture)
    sources = tuple(_open_sibling(path, base, source, architecture) for path in siblings)
    mixed = _shared_tensors([source, origin, *sources])
    plan = Shield(
        shield, source, origin, sources, mixed, _ranked(shield, architecture, source, mixed), Stream.from_seed(seed)
    )
    result = ShieldResult(out, shield.name, settings_of(shield), architecture.family, dry_run)
    if data is None:
        return result if dry_run else _write(plan, result, threads, progress)
    template = expert if (expert / "config.json").is_file() else base
    batches = EncodedData(DataSource(data, limit=shield.examples), Encoder(encoder or template), CALIBRATION_BATCH)
    next(iter(batches))  # data that cannot be read are refused before the network is loaded
    if dry_run:
        return result
    scored = plan.scored_by(_input_norms(plan, load_network(template), batches, progress))
    result = replace(result, unscored=tuple(name for name in plan.ranked if name not in scored.input_norms))
    return _write(scored, result, threads, progress)


@one_thread_per_kernel()
def _write(plan: Shield, result: ShieldResult, threads: int | None, progress: Progress) -> ShieldResult:
    """Find thresholds and boundaries, and write the release."""
    source, shield = plan.expert, plan.settings
    sensitivities, boundaries, ranked = _rank(plan, worker_threads(threads), progress)
    touched = plan.mixed if shield.is_global else frozenset(plan.ranked)

    def edit(name: str) -> Callable[[Tensor], Tensor]:
        return lambda tensor: plan.release_(name, tensor, sensitivities.get(name), boundaries)

    # The siblings are not among the inputs of the manifest, which anybody reads, but a change of one is other work.
    secrets = [sibling.index.headers_digest for sibling in plan.siblings]
    public = {name: value for name, value in settings_of(shield).items() if name != "coefficients"}
    rewrite(
        source,
        result.out,
        output_like(source, {name: edit(name) for name in source.names if name in touched}),
        manifest={
            "kind": "protected",
            "recipe": {"method": shield.name, "settings": public},
            "architecture": result.architecture,
            "note": NOTE,
        },
        resume_token=json.dumps([settings_of(shield), secrets, plan.stream.key.hex(), boundaries.tolist()]),
        also_read={"base": plan.base},
        threads=threads,
        progress=progress,
    )
    return replace(
        result,
        mixed=_weights(source, plan.mixed) if shield.is_global else 0,
        ranked=ranked,
        excluded=_weights(source, plan.ranked) - ranked,
        unit_boundaries=tuple(reversed(boundaries.tolist())),
    )


def _weights(source: TensorSource, names: Iterable[str]) -> int:
    return sum(source.spec(name).numel for name in names)


def _require_request(shield: SensitivityShield, siblings: Sequence[Path], data: Path | None) -> None:
    shield.require_siblings(len(siblings))
    if shield.reads_data and data is None:
        raise UsageError(
            "sensitivity_shield scores weights on data of the expert's domain; give some with data=FILE, or set "
            "exclusion=random or parts=global."
        )
    if data is not None and not shield.reads_data:
        raise UsageError("sensitivity_shield: these settings score no weights; leave the data out.")


def _open_sibling(folder: Path, base: Path, expert: TensorSource, architecture: Architecture) -> TensorSource:
    if not folder.exists():
        raise BadInput(f"sibling {folder} does not exist; give the folder of another fine-tune of the base.")
    sibling = open_checkpoint(folder, base=base)
    held = set(sibling.names)
    for name in _matrices(architecture, expert):
        if name not in held:
            raise Mismatch(f"sibling {folder} has no tensor {name}; give another fine-tune of the same base.")
        ours, theirs = expert.spec(name).shape, sibling.spec(name).shape
        if ours != theirs:
            raise Mismatch(
                f"tensor {name} is {list(ours)} in {expert.description} and {list(theirs)} in sibling {folder}; give "
                "another fine-tune of the same base."
            )
    return sibling


def _matrices(architecture: Architecture, source: TensorSource) -> list[str]:
    """Matrices of attention and feed-forwards, stacks of them included."""
    body = architecture.symmetry.select("query_key", "value_output", "heads", "feed_forward", "experts")
    return [name for name in architecture.symmetry.tensors_of(body) if len(source.spec(name).shape) > 1]


def _shared_tensors(sources: Sequence[TensorSource]) -> frozenset[str]:
    """Floating-point tensors that all hold in one shape."""
    held = [set(source.names) for source in sources]
    first = sources[0]
    return frozenset(
        name
        for name in first.names
        if torch_dtype(first.spec(name).dtype).is_floating_point
        and all(name in names for names in held)
        and len({source.spec(name).shape for source in sources}) == 1
    )


def _ranked(
    shield: SensitivityShield, architecture: Architecture, source: TensorSource, mixed: frozenset[str]
) -> tuple[str, ...]:
    """What the local part changes, in on-disk order."""
    if not shield.is_local:
        return ()
    chosen = mixed if shield.tensors == "all" else mixed & set(_matrices(architecture, source))
    return tuple(name for name in source.names if name in chosen)


def _input_norms(
    plan: Shield, network: Any, batches: EncodedData, progress: Progress
) -> Mapping[str, tuple[InputNorms, ...]]:
    """Norms in theta_G, and in G1 where it is asked for, which are put into the network one tensor at a time."""
    places = find_places(network)
    used = [name for name in plan.expert.names if name in places and name in plan.mixed]
    found: list[Mapping[str, InputNorms]] = []
    for number in range(plan.settings.scored_models):
        for name in used:
            show(places, {name: plan.model(name, is_perturbed=number > 0)})
        found.append(input_norms(network, batches, progress=progress))
    # A layer of the network that is not mixed is not the shield's to change.
    return {name: tuple(norms[name] for norms in found) for name in found[0] if name in plan.mixed}


def _rank(plan: Shield, workers: int, progress: Progress) -> tuple[dict[str, Sensitivity], Tensor, int]:
    """Thresholds by tensor, the boundaries of all units, and how many weights are in units."""
    sensitivities: dict[str, Sensitivity] = {}

    def count_first(name: str, add: Callable[[Tensor], None]) -> None:
        rows = plan.rows(name)
        by = plan.sensitivity(name, rows)
        if by is not None:
            sensitivities[name] = by
        for magnitudes in plan.magnitudes(name, rows, by):
            add(first_digits(magnitudes))

    counts = _total(plan.ranked, count_first, first_digits(torch.zeros(0)), workers, progress, "scoring weights")
    total = int(counts.sum())
    if total == 0:
        return sensitivities, torch.zeros(0), 0
    search = Boundaries.after_first_pass(counts, plan.settings.unit)

    def count_second(name: str, add: Callable[[Tensor], None]) -> None:
        for magnitudes in plan.magnitudes(name, plan.rows(name), sensitivities.get(name)):
            add(search.count(magnitudes))

    counts = _total(plan.ranked, count_second, search.zero_counts(), workers, progress, "ranking weights")
    return sensitivities, search.settled(counts), total


def _total(
    names: Sequence[str],
    count: Callable[[str, Callable[[Tensor], None]], None],
    total: Tensor,
    workers: int,
    progress: Progress,
    stage: str,
) -> Tensor:
    """What ``count`` adds for every tensor, added up: integers, so that the order does not matter."""
    lock = threading.Lock()
    done = 0

    def run(name: str) -> None:
        nonlocal done
        count(name, partial(_add_to, total, lock))
        with lock:
            done += 1
            progress(stage, done, len(names), "tensors")

    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in [pool.submit(run, name) for name in names]:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return total


def _add_to(total: Tensor, lock: threading.Lock, counts: Tensor) -> None:
    with lock:
        total += counts
