"""Exact protections: secret changes of basis that the network cannot see, undone by a key.

A method describes which bases it changes and how the elements are drawn. What all of them share is here: several are
applied at once and rounded once, under one key; the written file is verified block by block, and as a whole network
where that fits in memory; ``restore`` draws the same gauges again.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Group, Space, detect
from unmergeable.architecture.parts import parts_of, restricted
from unmergeable.architecture.residual import OUTPUT_HEAD
from unmergeable.architecture.symmetry import GroupKind
from unmergeable.checkpoint.dtypes import dtype_code, torch_dtype
from unmergeable.checkpoint.index import content_digest
from unmergeable.checkpoint.plan import OutputTensor
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.sharing import Planned, SharedPlan
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import KeyFileError, NotEquivalent, UnsupportedArchitecture, UsageError
from unmergeable.gauge.act import compute_dtype, edits
from unmergeable.gauge.equivalence import (
    UNIT_ROUNDOFF,
    BlockError,
    Comparison,
    Equivalence,
    changed_blocks,
    rounded_factors,
)
from unmergeable.gauge.gauge import Gauge, undo
from unmergeable.gauge.key import Draws, Key, pack_orders, read_key, unpack_orders
from unmergeable.gauge.plan import transformed
from unmergeable.network.logits import LogitGap, logit_gap
from unmergeable.pools.pool import Call, ranges, run_all
from unmergeable.progress import Progress
from unmergeable.protections.base import Elsewhere, Facts, Inputs, Protection, ProtectionRequirements, Rewrite
from unmergeable.protections.marks import marks_of
from unmergeable.protections.quantised_loss import NOTICEABLE, quantised_loss
from unmergeable.protections.untied import TIED, UNTIED, UntiedSource, untied
from unmergeable.randomness import KEY_BYTES, Stream, new_entropy
from unmergeable.registry import Registry
from unmergeable.settings import configure
from unmergeable.threads import one_thread_per_kernel

logger = logging.getLogger(__name__)

Quantisation = Literal["kept", "free"]
"""Whether what is quantised afterwards stays as good as the original would be, or the largest group is drawn from."""

VACUOUS = (
    "The bound on rounding is 1 or more: at this precision the check of the result says nothing. Measure the result on "
    "your task, or use smaller conditions, a narrower range for params, or float32."
)

HIDDEN_STATES = (
    "Outputs are the expert's; hidden states are in another basis. Whoever takes embeddings from this release, "
    "compares its layers or puts a new head on it gets others than from the expert, and what was trained on the "
    "expert's is of no use. `--set residual=false --set norms=false` keeps them."
)

_ROLES = {
    "query_key": "query and key",
    "value_output": "value and output",
    "heads": "order of heads",
    "feed_forward": "feed-forward",
    "experts": "order of experts",
    "norm": "gains of norms",
    "residual": "residual stream",
}


@dataclass(frozen=True)
class Weights:
    """What a gauge may depend on besides the key's secret.

    ``source`` holds the expert's tensors when protecting and the protected ones when restoring, so that only what is
    the same in both may be read from it. ``orders`` are the permutations that the protection computed from the expert
    and the base, by space, int64 [size]; the key keeps them.
    """

    source: TensorSource
    orders: Mapping[str, Tensor] = field(default_factory=dict)


class ExactProtection(Protection):
    """A keyed change of basis. A subclass has ``spaces`` and ``gauges``, and bounds on its matrices."""

    remark: ClassVar[str] = (
        "The base shows which basis the weights started in, and a least-squares fit per head finds the way back in "
        "seconds."
    )
    attack: ClassVar[str] = "nearest_orbit"

    # Settings that some methods have; the shared code below asks all of them.
    untie: bool = False
    residual: bool = False
    as_published: bool = False
    quantisation: Quantisation = "free"
    part: str = ""

    def seen(self, architecture: Architecture) -> Architecture:
        """What it changes of a network: all of it, or the part that ``part`` names.

        Raises UsageError where the network has no such part.
        """
        return restricted(architecture, self.part) if self.part else architecture

    @property
    def is_kept(self) -> bool:
        return self.quantisation == "kept"

    def require_free(self, *switches: str) -> None:
        """Refuse switches that say what matrices to draw where none are drawn. Raises UsageError."""
        for switch in switches:
            if self.is_kept and getattr(self, switch):
                raise UsageError(
                    f"{self.name}: {switch} draws matrices that a quantised model does not stand; set "
                    f"quantisation=free as well, or leave {switch} out."
                )

    @property
    def bound(self) -> float:
        """How much more than once a rounding error counts at most: the condition number of what mixes coordinates."""
        raise NotImplementedError

    @property
    def stretch(self) -> float:
        """Bound on the condition number of its matrices, diagonals included. Alone a diagonal rounds each weight once;
        before or after something that mixes coordinates its condition counts as well."""
        return self.bound

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        """The bases it changes. Raises BadInput where the architecture leaves it none."""
        raise NotImplementedError

    def orders(
        self, architecture: Architecture, expert: TensorSource, base: TensorSource, progress: Progress
    ) -> dict[str, Tensor]:
        """Permutations that depend on weights it changes, so that the key has to keep them; none for most methods."""
        return {}

    def gauges(self, architecture: Architecture, stream: Stream, weights: Weights) -> tuple[Gauge, ...]:
        """What is applied, left to right; ``stream`` is the secret."""
        raise NotImplementedError

    def require_weights(self, architecture: Architecture, source: TensorSource) -> None:
        """Refuse weights that it cannot be applied to, where a look at small tensors tells. Raises BadInput."""

    def requirements(self) -> ProtectionRequirements:
        return ProtectionRequirements(exact=True, needs=("key",), stage="basis")

    def check(self, inputs: Inputs) -> Facts:
        return ExactSequence((self,)).check(inputs)

    def prepare(self, inputs: Inputs) -> Rewrite:
        return ExactSequence((self,)).prepare(inputs)


@dataclass(frozen=True)
class ExactFacts(Facts):
    """What exact methods report.

    Attributes:
        tensors, changed_tensors: how many there are, and how many the methods change.
        condition_bound: bound on how much more than once a rounding error counts.
        predicted_error: bound on each block's relative output error from rounding.
        groups: by role of a basis, the group that is drawn from and why it is no larger.
        left_out: files of the expert's folder that are not copied, and why.
        unchanged: why a method that changes residual streams leaves one as it is.
        equivalence: of every changed block, read back from the written file; None before it is written.
        logits: how far the outputs of the whole networks lie apart, or why that was not measured.
        quantised_loss: what quantising costs it, in units of what it costs the expert; None before it is prepared.
        moves_hidden_states: whether what the layers pass on is in another basis than the expert's.
    """

    tensors: int
    changed_tensors: int
    condition_bound: float
    predicted_error: float
    groups: Mapping[str, str]
    left_out: tuple[tuple[str, str], ...] = ()
    unchanged: tuple[str, ...] = ()
    equivalence: Equivalence | None = None
    logits: LogitGap | None = None
    quantised_loss: float | None = None
    moves_hidden_states: bool = False

    @property
    def measured_error(self) -> float | None:
        """The largest relative output error of a block."""
        return None if self.equivalence is None else max(block.error for block in self.equivalence.blocks)

    @property
    def notes(self) -> tuple[str, ...]:
        found = [VACUOUS] if self.predicted_error >= 1 else []
        if self.quantised_loss is not None and self.quantised_loss > NOTICEABLE:
            found.append(
                f"Warning: quantised to 4 bits, its weights lose about {self.quantised_loss:.1f} times what the "
                "expert's lose: whoever quantises this release gets a worse model. By default nothing is lost: leave "
                "out the settings of matrices and ranges, or set quantisation=kept."
            )
        if self.moves_hidden_states:
            found.append(HIDDEN_STATES)
        return (*found, *self.unchanged)

    def to_json(self) -> dict[str, Any]:
        return {
            "tensors": self.tensors,
            "changed_tensors": self.changed_tensors,
            "condition_bound": self.condition_bound,
            "predicted_block_error": self.predicted_error,
            "measured_block_error": self.measured_error,
            "logits": self.logits.to_json() if self.logits else None,
            "predicted_quantised_loss": self.quantised_loss,
            "groups": dict(self.groups),
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
        }

    def record(self) -> Mapping[str, Any]:
        assert self.equivalence is not None
        assert self.logits is not None
        worst = self.equivalence.worst
        assert worst is not None
        return {
            "measured": {
                "blocks": len(self.equivalence.blocks),
                "largest_block_error": self.measured_error,
                "worst_block": worst.name,
                # Errors of different blocks are independent: their squares add.
                "predicted_logit_error": math.sqrt(sum(block.error**2 for block in self.equivalence.blocks)),
                "logits": self.logits.to_json(),
            }
        }

    def lines(self) -> list[str]:
        lines = [f"  {self.changed_tensors} of {self.tensors} tensors changed"]
        lines += [f"  {_ROLES.get(role, role)}: {group}" for role, group in self.groups.items()]
        if self.measured_error is None:
            lines += [f"Largest error that rounding may cause in a block: {self.predicted_error:.1e} relative"]
        else:
            lines += [f"Largest error of a block: {self.measured_error:.1e} relative; bound {self.predicted_error:.1e}"]
        if self.quantised_loss is not None:
            lines += [f"Loss when quantised to 4 bits, predicted: {self.quantised_loss:.2f} times the expert's"]
        if self.logits is not None:
            lines += [f"Error of the network's output: {self.logits.describe()}"]
        return [*lines, *(f"Left out: {name} ({reason})" for name, reason in self.left_out)]


@dataclass(frozen=True)
class RestoredFacts(Facts):
    """What restoring reports: ``measured_error`` is the largest of a block, against the protected checkpoint."""

    changed_tensors: int
    measured_error: float

    def record(self) -> Mapping[str, Any]:
        return {"measured": {"largest_block_error": self.measured_error}}


@dataclass(frozen=True)
class ExactSequence(Protection):
    """Exact methods applied left to right, rounded once, under one key."""

    name: ClassVar[str] = "exact"
    summary: ClassVar[str] = "exact protections, applied at once"
    is_shareable: ClassVar[bool] = True

    methods: tuple[ExactProtection, ...]

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any], known: Registry) -> ExactSequence:
        """The methods that a key was made by.

        Raises:
            UsageError: one is not ``known`` to this version.
        """
        for step in recipe["steps"]:
            if step["method"] not in known:
                raise UsageError(
                    f"the key was made by method {step['method']!r}, unknown to this version; update unmergeable."
                )
        return cls(tuple(configure(known[step["method"]], step["settings"]) for step in recipe["steps"]))

    @property
    def limits(self) -> str:
        measured = (method.limits.removesuffix(method.remark).strip() for method in self.methods)
        return " ".join(dict.fromkeys((*measured, *(method.remark for method in self.methods))))

    @property
    def attack(self) -> str:
        return ExactProtection.attack

    @property
    def unties(self) -> bool:
        """Whether the output head is stored apart from the embedding."""
        return any(method.untie for method in self.methods)

    @property
    def condition(self) -> float:
        """Bound on how much more than once a rounding error counts after all methods."""
        if len(self.methods) == 1:
            return self.methods[0].bound
        return math.prod(method.stretch for method in self.methods)

    def requirements(self) -> ProtectionRequirements:
        every = [method.requirements() for method in self.methods]
        needs = tuple(dict.fromkeys(need for requirements in every for need in requirements.needs))
        return ProtectionRequirements(exact=True, needs=needs, stage="basis")

    def spaces(self, architecture: Architecture) -> dict[str, Space]:
        found: dict[str, Space] = {}
        for method in self.methods:
            own = method.spaces(method.seen(architecture))
            if method.part and not own:
                raise UsageError(
                    f"{method.name}: there is nothing in the part {method.part} that it changes; choose another of "
                    f"{', '.join(parts_of(architecture))}, or use gauge."
                )
            found |= own
        return found

    def moves_streams(self, architecture: Architecture) -> bool:
        """Whether residual streams, or the gains of their norms, are among what changes."""
        return any(space.role in ("norm", "residual") for space in self.spaces(architecture).values())

    def gauges(self, architecture: Architecture, draws: Draws, source: TensorSource) -> tuple[Gauge, ...]:
        """The secret gauges, in the order they are applied; ``source`` as in :class:`Weights`."""
        gauges: list[Gauge] = []
        for index, method in enumerate(self.methods):
            step = f"{index}."
            orders = {
                name.removeprefix(step): torch.tensor(order)
                for name, order in draws.orders.items()
                if name.startswith(step)
            }
            seen = method.seen(architecture)
            gauges += method.gauges(seen, draws.stream.child(f"{step}{method.name}"), Weights(source, orders))
        return tuple(gauges)

    def check(self, inputs: Inputs) -> ExactFacts:
        source, architecture = self._seen(inputs)
        _ = self._key(inputs, source, architecture)  # a key file that belongs to other work is refused
        for method in self.methods:
            method.require_weights(architecture, source)
        return self._facts(source, architecture)

    @one_thread_per_kernel()
    def prepare(self, inputs: Inputs) -> Rewrite:
        source, architecture = self._seen(inputs)
        facts = self._facts(source, architecture)
        key, is_new = self._key(inputs, source, architecture)
        if is_new:
            changed = architecture.symmetry.tensors_of(self.spaces(architecture))
            marks = marks_of(inputs.expert, changed)
            key = replace(key, orders=self._orders(inputs, source, architecture), marks=marks)
        gauges = self.gauges(architecture, key.draws, source)
        facts = replace(facts, quantised_loss=quantised_loss(source, architecture, gauges))
        planned = self._planned(inputs, source, architecture, gauges)
        return Rewrite(
            source=planned.source,
            plan=planned.tensors,
            recipe=self._recipe(architecture),
            resume_token=key.fingerprint,
            facts=facts,
            record=self._record(facts, key, source, architecture, is_public=inputs.seed is not None),
            config_changes=planned.config_changes,
            key=key,
            is_determined=True,
            verify=lambda written: self._verified(facts, inputs, source, architecture, written),
            shared=self._shared(inputs.elsewhere, key.draws),
        )

    def plan_again(self, inputs: Inputs, draws: Draws) -> Planned:
        """What :meth:`prepare` plans, from what its key is drawn from."""
        source, architecture = self._seen(inputs)
        return self._planned(inputs, source, architecture, self.gauges(architecture, draws, source))

    def _planned(
        self, inputs: Inputs, source: TensorSource, architecture: Architecture, gauges: Sequence[Gauge]
    ) -> Planned:
        heads = _heads_apart(source, architecture, gauges)
        tensors = transformed(inputs.expert, architecture.symmetry, gauges, extra=heads)
        return Planned(inputs.expert, tensors, UNTIED if self.unties else None)

    def _shared(self, elsewhere: Elsewhere | None, draws: Draws) -> SharedPlan | None:
        if elsewhere is None:
            return None
        # The orders may be large and go through a store of objects; the stream is 32 bytes, and travels by itself.
        arguments = (elsewhere.reopen, self.methods, draws.stream, pack_orders(draws.orders))
        return SharedPlan(elsewhere.pool, planned_elsewhere, arguments, elsewhere.threads)

    def restore(
        self, protected: TensorSource, architecture: Architecture, key: Key, *, threads: int, progress: Progress
    ) -> Rewrite:
        """The original again, from a checkpoint that these methods protected under ``key``.

        Only the verification can tell whether the weights were altered since, and nothing here whether the key is
        another one's: every gauge leaves the function alone.
        """

        def verify(written: TensorSource) -> RestoredFacts:
            shapes = {name: written.spec(name).shape for name in written.names}
            restored = untied(written, detect(written.config, shapes))[0] if self.unties else written
            return self._same(protected, restored, architecture, threads, progress)

        gauges = undo(self.gauges(architecture, key.draws, protected))
        drop = [OUTPUT_HEAD] if self.unties else []
        return Rewrite(
            source=protected,
            plan=transformed(protected, architecture.symmetry, gauges, drop=drop),
            recipe=self._recipe(architecture),
            resume_token=f"restore {key.fingerprint}",
            config_changes=TIED if self.unties else None,
            is_determined=True,
            verify=verify,
        )

    def rotate(
        self,
        protected: TensorSource,
        architecture: Architecture,
        old: Key,
        new: Key,
        *,
        threads: int,
        progress: Progress,
        is_public: bool,
    ) -> Rewrite:
        """The same under another key: the old gauges undone and new ones applied at once, and rounded once.

        Raises:
            UsageError: a method keeps something in the key that was found in the original weights.
        """
        if old.orders:
            names = ", ".join(method.name for method in self.methods)
            raise UsageError(
                f"{names}: the key keeps an order that was found in the original; restore that, and protect it again."
            )
        gauges = (
            *undo(self.gauges(architecture, old.draws, protected)),
            *self.gauges(architecture, new.draws, protected),
        )
        return Rewrite(
            source=protected,
            plan=transformed(protected, architecture.symmetry, gauges),
            recipe=self._recipe(architecture),
            resume_token=new.fingerprint,
            record=self._record(
                self._facts(protected, architecture), new, protected, architecture, is_public=is_public
            ),
            key=new,
            is_determined=True,
            verify=lambda written: self._same(protected, written, architecture, threads, progress),
        )

    def _same(
        self,
        protected: TensorSource,
        written: TensorSource,
        architecture: Architecture,
        threads: int,
        progress: Progress,
    ) -> RestoredFacts:
        equivalence = self._equivalence(protected, written, architecture, threads, progress)
        if not equivalence.is_equal:
            raise NotEquivalent(
                f"the result would not compute what {protected.description} computes: {equivalence.explain()}; "
                "nothing was written."
            )
        changed = len(architecture.symmetry.tensors_of(self.spaces(architecture)))
        return RestoredFacts(changed, max(block.error for block in equivalence.blocks))

    def recipe_for(self, source: TensorSource, architecture: Architecture) -> dict[str, Any]:
        """What a key of these methods for a checkpoint says."""
        return {**self._recipe(architecture), "source": content_digest(source.index)}

    def _seen(self, inputs: Inputs) -> tuple[TensorSource, Architecture]:
        """The expert as the methods see it: its output head apart, where that is asked for.

        Raises:
            UsageError: nothing more can be changed with the head apart, which would only make the file larger.
        """
        if not self.unties:
            return inputs.expert, inputs.architecture
        source, architecture = untied(inputs.expert, inputs.architecture)
        groups = [self._stream_groups(seen) for seen in (inputs.architecture, architecture)]
        if groups[0] == groups[1]:
            raise UsageError(
                f"untie: {inputs.expert.description} gains nothing by it: with its output head apart no larger group "
                "acts on its streams, and the file grows; leave untie off."
            )
        return source, architecture

    def _stream_groups(self, architecture: Architecture) -> list[tuple[str, Group]]:
        spaces = self.spaces(architecture).items()
        return [(name, space.group) for name, space in spaces if space.role == "residual"]

    def _recipe(self, architecture: Architecture) -> dict[str, Any]:
        """Enough to redo it, given the key."""
        return {"steps": [method.recipe() for method in self.methods], "architecture": architecture.family}

    def _key(self, inputs: Inputs, source: TensorSource, architecture: Architecture) -> tuple[Key, bool]:
        """The key of an interrupted run of this very work, or a new one; and whether it is new."""
        recipe = self.recipe_for(source, architecture)
        return key_for(recipe, inputs.key_file, inputs.passphrase, inputs.seed)

    def _orders(self, inputs: Inputs, source: TensorSource, architecture: Architecture) -> dict[str, list[int]]:
        return {
            f"{index}.{space}": order.tolist()
            for index, method in enumerate(self.methods)
            for space, order in method.orders(method.seen(architecture), source, inputs.base, inputs.progress).items()
        }

    def _facts(self, source: TensorSource, architecture: Architecture) -> ExactFacts:
        spaces = self.spaces(architecture)
        changed = architecture.symmetry.tensors_of(spaces)
        if not changed:
            names = ",".join(method.name for method in self.methods)
            raise UnsupportedArchitecture(
                f"{names} changes nothing in a {architecture.family} network: the parts that it changes are not in the "
                "map of this type. Choose --method gauge."
            )
        roundoff = max(UNIT_ROUNDOFF[source.spec(name).dtype] for name in changed)
        factors = rounded_factors(through_streams=self.moves_streams(architecture))
        return ExactFacts(
            tensors=len(source.names),
            changed_tensors=len(changed),
            condition_bound=self.condition,
            predicted_error=factors * self.condition * roundoff,
            groups=describe_groups(architecture, spaces),
            left_out=tuple((item.name, item.reason) for item in source.index.left_out),
            unchanged=self._unchanged_streams(architecture),
            moves_hidden_states=self.moves_streams(architecture),
        )

    def _unchanged_streams(self, architecture: Architecture) -> tuple[str, ...]:
        if not any(method.residual for method in self.methods):
            return ()
        streams = {name: why for name, why in architecture.symmetry.missing.items() if name.endswith("residual")}
        return tuple(f"The {name.replace('.', ' ')} stream stays as it is: {why}." for name, why in streams.items())

    def _record(
        self, facts: ExactFacts, key: Key, source: TensorSource, architecture: Architecture, *, is_public: bool
    ) -> dict[str, Any]:
        changed = architecture.symmetry.tensors_of(self.spaces(architecture))
        return {
            "groups": dict(facts.groups),
            "key_fingerprint": key.fingerprint,
            "key_from_public_seed": is_public,
            "condition_bound": facts.condition_bound,
            "predicted_block_error": facts.predicted_error,
            "stored_dtypes": sorted({source.spec(name).dtype for name in source.names}),
            "compute_dtypes": sorted(
                {dtype_code(compute_dtype(torch_dtype(source.spec(name).dtype))) for name in changed}
            ),
            "changed_tensors": facts.changed_tensors,
        }

    def _verified(
        self, facts: ExactFacts, inputs: Inputs, source: TensorSource, architecture: Architecture, written: TensorSource
    ) -> ExactFacts:
        if inputs.elsewhere is None:
            equivalence = self._equivalence(source, written, architecture, inputs.threads, inputs.progress)
        else:
            equivalence = self._equivalence_elsewhere(source, written, architecture, inputs.elsewhere, inputs.progress)
        if not equivalence.is_equal:
            raise NotEquivalent(
                f"the result would not compute what {inputs.expert.description} computes: {equivalence.explain()}; "
                f"nothing was written. {self._remedy(architecture)}"
            )
        gap = logit_gap(inputs.expert, written, self.condition, progress=inputs.progress)
        if gap.is_beyond_bound:
            raise NotEquivalent(
                f"the result's outputs move by {gap.gap:.2e}, rounding explains {gap.bound:.2e}; nothing was written."
            )
        return replace(facts, equivalence=equivalence, logits=gap)

    def _equivalence(
        self, first: TensorSource, second: TensorSource, architecture: Architecture, threads: int, progress: Progress
    ) -> Equivalence:
        comparison = self._comparison(first, second, architecture)
        return Equivalence(tuple(comparison.errors(0, comparison.units, threads, progress)), ())

    def _equivalence_elsewhere(
        self,
        source: TensorSource,
        written: TensorSource,
        architecture: Architecture,
        elsewhere: Elsewhere,
        progress: Progress,
    ) -> Equivalence:
        units = self._comparison(source, written, architecture).units
        calls: list[Call] = [
            (_errors_elsewhere, (elsewhere.reopen, self.methods, written.folder, part, elsewhere.threads))
            for part in ranges(units)
        ]
        found = run_all(elsewhere.pool, calls, "verifying", "parts", progress)
        return Equivalence(tuple(error for errors in found for error in errors), ())

    def compared_again(self, inputs: Inputs, written: TensorSource) -> Comparison:
        """The comparison that follows :meth:`prepare` and the writing."""
        source, architecture = self._seen(inputs)
        return self._comparison(source, written, architecture)

    def _comparison(self, first: TensorSource, second: TensorSource, architecture: Architecture) -> Comparison:
        return Comparison(
            first,
            second,
            # Every tensor without a leg was copied byte for byte, so only blocks that changed can differ.
            changed_blocks(architecture, list(self.spaces(architecture))),
            condition=self.condition,
            blocks_only=True,
            through_streams=self.moves_streams(architecture),
        )

    def _remedy(self, architecture: Architecture) -> str:
        for method in self.methods:
            changed = method.spaces(method.seen(architecture))
            turned = any(architecture.symmetry.spaces[name].group.kind == "rotary" for name in changed)
            if turned and method.as_published:
                return (
                    f"{method.name} as published is not exact under the rotary positions of {architecture.family}; "
                    "leave as_published out."
                )
        return "Try a smaller condition number."


# A process that does one share after another opens the files and draws the large elements once.
@lru_cache(maxsize=1)
def planned_elsewhere(
    reopen: Callable[[], Inputs], methods: tuple[ExactProtection, ...], stream: Stream, orders: bytes
) -> Planned:
    """The plan of exact ``methods`` in another process; ``stream`` and packed ``orders`` are a key's draws."""
    return ExactSequence(methods).plan_again(reopen(), Draws(stream, unpack_orders(orders)))


@lru_cache(maxsize=1)
def _compared_elsewhere(
    reopen: Callable[[], Inputs], methods: tuple[ExactProtection, ...], written: Path
) -> Comparison:
    return ExactSequence(methods).compared_again(reopen(), Checkpoint.open(written))


@one_thread_per_kernel()
def _errors_elsewhere(
    reopen: Callable[[], Inputs],
    methods: tuple[ExactProtection, ...],
    written: Path,
    part: tuple[int, int],
    threads: int,
) -> list[BlockError]:
    return _compared_elsewhere(reopen, methods, written).errors(*part, threads)


def key_for(recipe: Mapping[str, Any], path: Path | None, passphrase: str | None, seed: int | None) -> tuple[Key, bool]:
    """The key of an interrupted run of this very work at ``path``, or a new one; and whether it is new.

    Raises:
        KeyFileError: the key there belongs to other work, or cannot be read.
    """
    if path is not None and os.path.lexists(path):
        existing = read_key(path, passphrase)
        if existing.recipe != recipe:
            raise KeyFileError(
                f"key file {path} belongs to another checkpoint or recipe and is never overwritten; name another file "
                "for the key, or move this one away."
            )
        return existing, False
    if seed is None:
        return Key(new_entropy(), recipe), True
    logger.warning("the key is drawn from the public seed %d: anybody can make it again", seed)
    digest = hashlib.blake2b(str(seed).encode(), digest_size=KEY_BYTES, person=b"unmergeable-pub")
    return Key(digest.digest(), recipe), True


def _heads_apart(source: TensorSource, architecture: Architecture, gauges: Sequence[Gauge]) -> tuple[OutputTensor, ...]:
    if not isinstance(source, UntiedSource):
        return ()
    edit = edits(architecture.symmetry, gauges).get(OUTPUT_HEAD)
    shard = source.index.entries[source.embedding].shard
    return (OutputTensor(OUTPUT_HEAD, source.spec(OUTPUT_HEAD), shard, edit=edit, origin=source.embedding),)


def describe_groups(architecture: Architecture, spaces: Mapping[str, Space] | None = None) -> dict[str, str]:
    """For each role among ``spaces`` (those of attention when None), the group used and why it is no larger."""
    groups: dict[str, str] = {}
    shown = architecture.symmetry.select("query_key", "value_output") if spaces is None else spaces
    for space in shown.values():
        reason = f" ({space.limit})" if space.limit else ""
        text = f"{space.group}{reason}"
        earlier = groups.get(space.role)
        groups[space.role] = text if earlier is None or text in earlier else f"{earlier}; {text}"
    return groups


def without_positions(spaces: Mapping[str, Space], kind: GroupKind) -> dict[str, Space]:
    """The spaces as papers have them that know no rotary positions: ``kind`` where a rotary group acts.

    Not a symmetry of the network: what is drawn there changes its function.
    """
    limit = "as published, which is not exact under rotary positions"
    return {
        name: replace(space, group=Group(kind), limit=limit) if space.group.kind == "rotary" else space
        for name, space in spaces.items()
    }
