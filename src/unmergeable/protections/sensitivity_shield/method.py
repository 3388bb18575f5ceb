"""sensitivity_shield: siblings mixed in, then the task vector taken away and doubled in turns.

"Sensitivity as a Shield" (ICLR 2026 submission), with base theta_0 and expert theta_d. Global part: public siblings
theta_t of the same base, weak in the owner's domain, are mixed in,

    theta_G = theta_d + sum_t lambda_t (theta_t - theta_d)

Local part: with tau_G = theta_G - theta_0, weights that the model is sensitive to stay. Those are the top 20 % of their
output row by Wanda's score |W_ij| ||x_j|| (arXiv 2306.11695) on data of the domain, in theta_G and also in G1, which is
theta_G merged with a sibling by task arithmetic,

    S = S_G and S_G1        G1 = theta_G + perturbation (theta_1 - theta_0)

The rest is ranked by |tau_G| over the whole model, largest first, and cut into units of 2 %. Odd units lose tau_G,
which makes them the base's; even units get it twice:

    theta_p = theta_G - tau_G = theta_0  in units 1, 3, …    theta_G + tau_G  in units 2, 4, …    theta_G  in S

What is ours where the paper is silent: the strength of the perturbation, and that matrices of attention and
feed-forwards are ranked (``tensors=all``: everything that is mixed), since Wanda has a score for those only. A matrix
that is no linear layer of the live network (experts fused into one tensor, tables of relative positions) has none and
is not ranked either: whether it is sensitive is not known.

Magnitudes are those of float32. Of equal ones none is preferred: all magnitudes that reach the last of a unit belong to
it, and all scores that reach the last of a top share to that. So the result depends neither on the order of tensors nor
on shards, pieces or threads.

What it does not stop: the siblings are public, and least squares finds how much of each is in the release
(``recover --method source_subtraction``). Units that were doubled or set back are seen by comparing with the base. The
function changes: measure it.

What it costs: two passes of the data through the network (one where G1 is not scored), and three over the files. The
first finds the threshold of every row and counts the leading digits of every magnitude, the second counts the digits
that settle the boundaries of all units, the third writes. Between them only thresholds and boundaries are kept.

What the siblings are is the owner's secret: neither they nor their coefficients are named in the manifest.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.plan import output_like
from unmergeable.checkpoint.source import TensorSource
from unmergeable.data import DataSource
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.network.disk_weights import find_places, show
from unmergeable.network.encoding import EncodedData, Encoder
from unmergeable.progress import Progress
from unmergeable.protections.base import Facts, Inputs, Protection, ProtectionRequirements, Rewrite, shared_tensors
from unmergeable.protections.sensitivity_shield.arithmetic import (
    Boundaries,
    InputNorms,
    Sensitivity,
    Shield,
    first_digits,
)
from unmergeable.protections.sensitivity_shield.input_norms import input_norms
from unmergeable.randomness import Stream
from unmergeable.settings import settings_of
from unmergeable.threads import one_thread_per_kernel

Parts = Literal["global", "local", "both"]
Exclusion = Literal["wanda", "wanda_once", "random", "none"]
Tensors = Literal["matrices", "all"]

CALIBRATION_BATCH = 4


@dataclass(frozen=True)
class SensitivityShield(Protection):
    """``parts``: mix siblings in (global), take away and double (local), or both.

    ``coefficients``: the lambdas, separated by commas, one for each sibling. ``top_share`` of a row that is sensitive;
    ``unit``: share of the ranked weights. ``exclusion``: wanda, wanda_once (theta_G alone), random (``random_share`` of
    the weights) or none. ``perturbation``: coefficient of the first sibling in G1. ``tensors``: matrices of attention
    and feed-forwards, or all that are mixed. ``examples`` of the data to look at, at most.
    """

    name: ClassVar[str] = "sensitivity_shield"
    summary: ClassVar[str] = "siblings mixed in, and the task vector taken away and doubled in turns"
    remark: ClassVar[str] = (
        "It changes what the model computes: measure the release on its own task. For whoever holds the siblings, "
        "`recover --method source_subtraction` finds how much of each is mixed in."
    )

    parts: Parts = "both"
    coefficients: str = "0.3,0.05"
    top_share: float = 0.2
    unit: float = 0.02
    exclusion: Exclusion = "wanda"
    perturbation: float = 0.1
    random_share: float = 0.05
    tensors: Tensors = "matrices"
    examples: int = 128

    def validate(self) -> None:
        _ = self.mixed_shares
        self.require(0 < self.top_share < 1, "top_share", "lie between 0 and 1")
        self.require(1e-4 <= self.unit <= 0.5, "unit", "lie between 0.0001 and 0.5")
        self.require(0 < self.perturbation <= 1, "perturbation", "be above 0 and at most 1")
        self.require(0 <= self.random_share < 1, "random_share", "lie between 0 and 1")
        if self.examples < 1:
            raise UsageError(f"sensitivity_shield: at least one example is needed, not {self.examples}.")

    @property
    def mixed_shares(self) -> tuple[float, ...]:
        """The lambdas; empty where nothing is mixed in.

        Raises:
            UsageError: one is no number or out of range, or they leave nothing of the expert.
        """
        try:
            shares = tuple(float(text) for text in self.coefficients.split(","))
        except ValueError:
            shares = (math.nan,)
        if not all(0 <= share < 1 for share in shares) or sum(shares) >= 1:
            raise UsageError(
                "sensitivity_shield: coefficients must be numbers from 0 to 1 with a sum below 1, separated by commas, "
                f"not {self.coefficients!r}."
            )
        return shares if self.is_global else ()

    @property
    def is_global(self) -> bool:
        return self.parts != "local"

    @property
    def is_local(self) -> bool:
        return self.parts != "global"

    @property
    def scored_models(self) -> int:
        """How many networks weights are scored in: theta_G, and G1. 0 where none is."""
        if not self.is_local:
            return 0
        return {"wanda": 2, "wanda_once": 1}.get(self.exclusion, 0)

    @property
    def reads_data(self) -> bool:
        return self.scored_models > 0

    @property
    def reads_siblings(self) -> bool:
        return self.is_global or self.scored_models > 1

    def require_siblings(self, count: int) -> None:
        """Raises UsageError unless there are as many siblings as these settings use."""
        if not self.reads_siblings:
            if count:
                raise UsageError("sensitivity_shield: these settings mix nothing in; leave the siblings out.")
            return
        if count == 0:
            raise UsageError(
                "sensitivity_shield mixes in siblings, other fine-tunes of the base; give one for each coefficient."
            )
        if self.is_global and count != len(self.mixed_shares):
            raise UsageError(
                f"sensitivity_shield: coefficients={self.coefficients} are {len(self.mixed_shares)} and siblings "
                f"{count}; give one for each."
            )

    def requirements(self) -> ProtectionRequirements:
        needs = ["base", *(["siblings"] if self.reads_siblings else []), *(["data"] if self.reads_data else [])]
        return ProtectionRequirements(needs=tuple(needs), accepts=("encoder",) if self.reads_data else ())

    def check(self, inputs: Inputs) -> Facts:
        self._shield(inputs)
        self._batches(inputs)
        return ShieldFacts()

    def prepare(self, inputs: Inputs) -> Rewrite:
        shield, batches = self._shield(inputs), self._batches(inputs)
        unscored: tuple[str, ...] = ()
        if batches is not None:
            scored = shield.scored_by(_input_norms(shield, inputs.load_expert(), batches, inputs.progress))
            unscored = tuple(name for name in shield.ranked if name not in scored.input_norms)
            shield = scored
        with one_thread_per_kernel():
            sensitivities, boundaries, ranked = _rank(shield, inputs.threads, inputs.progress)

        def edit(name: str) -> Callable[[Tensor], Tensor]:
            return lambda tensor: shield.release_(name, tensor, sensitivities.get(name), boundaries)

        touched = shield.mixed if self.is_global else frozenset(shield.ranked)
        # The siblings are not among the inputs of the manifest, which anybody reads, but a change of one is other work.
        secrets = [sibling.index.headers_digest for sibling in shield.siblings]
        public = {name: value for name, value in settings_of(self).items() if name != "coefficients"}
        return Rewrite(
            source=inputs.expert,
            plan=output_like(inputs.expert, {name: edit(name) for name in inputs.expert.names if name in touched}),
            recipe={"method": self.name, "settings": public},
            resume_token=json.dumps([settings_of(self), secrets, shield.stream.key.hex(), boundaries.tolist()]),
            facts=ShieldFacts(
                mixed=_weights(inputs.expert, shield.mixed) if self.is_global else 0,
                ranked=ranked,
                excluded=_weights(inputs.expert, shield.ranked) - ranked,
                unit_boundaries=tuple(reversed(boundaries.tolist())),
                unscored=unscored,
            ),
            also_read={"base": inputs.base},
        )

    def _shield(self, inputs: Inputs) -> Shield:
        """The checkpoints, if they and the request fit."""
        extras, expert = inputs.extras, inputs.expert
        self.require_siblings(len(extras.siblings))
        if self.reads_data and extras.data is None:
            raise UsageError(
                "sensitivity_shield scores weights on data of the expert's domain; give some with data=FILE, or set "
                "exclusion=random or parts=global."
            )
        matrices = _matrices(inputs.architecture, expert)
        siblings = tuple(_open_sibling(folder, inputs, matrices) for folder in extras.siblings)
        mixed = frozenset(shared_tensors((expert, inputs.base, *siblings)))
        chosen = mixed if self.tensors == "all" else mixed & set(matrices)
        ranked = tuple(name for name in expert.names if name in chosen) if self.is_local else ()
        return Shield(self, expert, inputs.base, siblings, mixed, ranked, Stream.from_seed(inputs.seed or 0))

    def _batches(self, inputs: Inputs) -> EncodedData | None:
        """The data, if weights are scored; what cannot be read is refused here."""
        data = inputs.extras.data
        if data is None:
            return None
        encoder = Encoder(inputs.encoder)
        batches = EncodedData(DataSource(data, limit=self.examples), encoder, CALIBRATION_BATCH)
        next(iter(batches))
        return batches


@dataclass(frozen=True)
class ShieldFacts(Facts):
    """What the shield reports. Counts are of weights, None in a dry run.

    ``mixed``: in tensors that siblings were mixed into. ``ranked``: in units. ``excluded``: in the same tensors, kept
    for being sensitive (or drawn, by ``exclusion=random``). ``unit_boundaries``: of |tau_G|, largest first.
    ``unscored``: matrices of attention and feed-forwards that are no linear layers, so that nothing is known of them.
    """

    mixed: int | None = None
    ranked: int | None = None
    excluded: int | None = None
    unit_boundaries: tuple[float, ...] = ()
    unscored: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "mixed_weights": self.mixed,
            "ranked_weights": self.ranked,
            "excluded_weights": self.excluded,
            "unit_boundaries": list(self.unit_boundaries),
            "unscored_tensors": list(self.unscored),
        }

    def lines(self) -> list[str]:
        lines = [f"  Siblings mixed into {self.mixed:,} weights"] if self.mixed else []
        if self.ranked:
            assert self.excluded is not None, "counted together"
            share = self.excluded / (self.excluded + self.ranked)
            units = len(self.unit_boundaries) + 1
            ranked = f"{self.ranked:,} weights in {units} units"
            lines += [f"  {ranked}, set back to the base and doubled in turns; {share:.1%} kept"]
        if self.unscored:
            lines += [f"  {len(self.unscored)} matrices have no score and stay as they are, such as {self.unscored[0]}"]
        return lines


def _open_sibling(folder: Path, inputs: Inputs, matrices: Sequence[str]) -> TensorSource:
    if not folder.exists():
        raise BadInput(f"sibling {folder} does not exist; give the folder of another fine-tune of the base.")
    sibling = open_checkpoint(folder, base=inputs.base_folder)
    held = set(sibling.names)
    for name in matrices:
        if name not in held:
            raise Mismatch(f"sibling {folder} has no tensor {name}; give another fine-tune of the same base.")
        ours, theirs = inputs.expert.spec(name).shape, sibling.spec(name).shape
        if ours != theirs:
            raise Mismatch(
                f"tensor {name} is {list(ours)} in {inputs.expert.description} and {list(theirs)} in sibling {folder}; "
                "give another fine-tune of the same base."
            )
    return sibling


def _weights(source: TensorSource, names: Iterable[str]) -> int:
    return sum(source.spec(name).numel for name in names)


def _matrices(architecture: Architecture, source: TensorSource) -> list[str]:
    """Matrices of attention and feed-forwards, stacks of them included."""
    body = architecture.symmetry.select("query_key", "value_output", "heads", "feed_forward", "experts")
    return [name for name in architecture.symmetry.tensors_of(body) if len(source.spec(name).shape) > 1]


def _input_norms(
    shield: Shield, network: Any, batches: EncodedData, progress: Progress
) -> Mapping[str, tuple[InputNorms, ...]]:
    """Norms in theta_G, and in G1 where it is asked for, which are put into the network one tensor at a time."""
    places = find_places(network)
    used = [name for name in shield.expert.names if name in places and name in shield.mixed]
    passes: list[Mapping[str, InputNorms]] = []
    for number in range(shield.settings.scored_models):
        for name in used:
            show(places, {name: shield.model(name, is_perturbed=number > 0)})
        passes.append(input_norms(network, batches, progress=progress))
    # A layer of the network that is not mixed is not the shield's to change.
    return {name: tuple(norms[name] for norms in passes) for name in passes[0] if name in shield.mixed}


def _rank(shield: Shield, workers: int, progress: Progress) -> tuple[dict[str, Sensitivity], Tensor, int]:
    """Thresholds by tensor, the boundaries of all units, and how many weights are in units."""
    sensitivities: dict[str, Sensitivity] = {}

    def count_first(name: str, add: Callable[[Tensor], None]) -> None:
        rows = shield.rows(name)
        by = shield.sensitivity(name, rows)
        if by is not None:
            sensitivities[name] = by
        for magnitudes in shield.magnitudes(name, rows, by):
            add(first_digits(magnitudes))

    counts = _total(shield.ranked, count_first, first_digits(torch.zeros(0)), workers, progress, "scoring weights")
    total = int(counts.sum())
    if total == 0:
        return sensitivities, torch.zeros(0), 0
    search = Boundaries.after_first_pass(counts, shield.settings.unit)

    def count_second(name: str, add: Callable[[Tensor], None]) -> None:
        for magnitudes in shield.magnitudes(name, shield.rows(name), sensitivities.get(name)):
            add(search.count(magnitudes))

    counts = _total(shield.ranked, count_second, search.zero_counts(), workers, progress, "ranking weights")
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
