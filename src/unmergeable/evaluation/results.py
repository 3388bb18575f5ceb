"""The result of an audit, typed: what stands in ``audit.json``, and the same to work with.

    result = unmergeable.audit("plan.yaml", out="audit")
    result.d_star["mergelock", "white_box"], result.interval["mergelock", "white_box"]
    print(result.table)

docs/audit.md explains every entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unmergeable.errors import BadInput
from unmergeable.evaluation.analyses import Analyses
from unmergeable.evaluation.flags import Flag
from unmergeable.evaluation.names import CONTROLS
from unmergeable.evaluation.records import INLINED, OPTIONAL, Record
from unmergeable.evaluation.threat_models import ThreatModel

RESULT = "audit.json"

NO_FIGURE = "–"

EXCESS = "excess of weights over running it, points"
"""The head of the column of excesses."""


@dataclass(frozen=True, kw_only=True)
class AttackRecord(Record):
    """What was done, for somebody who wants to do it again.

    ``cpu_seconds``: of the recovery, of merging, training and scoring once; without the search for the coefficients.
    ``steps`` and ``examples``: of a training, and the most examples that it read, its own task's among them; of a
    student, those it was taught with. ``start``: what is trained without the victim, where that is no merge.
    """

    recovery: str | None
    merge: str | None
    coefficients: tuple[float, ...] | None
    uses_victim: bool
    samples: int | None = None
    learning_rate: float | None = None
    start: str | None = field(default=None, metadata=OPTIONAL)
    steps: int | None = field(default=None, metadata=OPTIONAL)
    examples: int | None = field(default=None, metadata=OPTIONAL)
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class AtBar(Record):
    """D* where attacks must keep another share of the free-rider's skill."""

    kept_share: float
    d_star: float | None
    interval: tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class Trial(Record):
    """One free-rider, one key, one number of labelled examples.

    ``d_star`` and both ends of ``interval`` are None where the victim adds nothing; they and ``unprotected`` where
    nobody has the unprotected expert. The scores are those of the best attacks, on test examples; ``best`` says which
    these are, under ``unprotected``, ``protected``, ``without_victim``. ``bars``: the same at other shares of kept
    skill. ``area``: D* over the area between Pareto fronts, see :func:`unmergeable.evaluation.worst_case.area_between`.
    ``kept_on_test``: the share of the free-rider's own skill that the best attack keeps on test examples, on which
    nothing was selected. ``test_error``: standard error of ``d_star`` by the luck of the test examples alone.
    ``flags``: what is to be held against the figures, see :mod:`unmergeable.evaluation.flags`.
    """

    rider: str
    seed: int
    samples: int | None = None
    d_star: float | None
    interval: tuple[float | None, float | None]
    unprotected: float | None
    protected: float
    without_victim: float
    is_denominator_small: bool
    bars: tuple[AtBar, ...] = ()
    area: float | None = None
    kept_on_test: float | None = None
    test_error: float | None = None
    flags: tuple[Flag, ...] = ()
    attacks_tried: int
    search_cpu_seconds: float = 0.0
    best: Mapping[str, AttackRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for a D* without its interval, or without the score that it is a share of."""
        if self.d_star is not None and None in (*self.interval, self.unprotected):
            raise ValueError(f"D* of {self.rider} lacks its interval, or the score of the unprotected expert")


@dataclass(frozen=True, kw_only=True)
class Verdicts(Record):
    """What was found about one protection under one threat model.

    ``worst`` is the trial with the lowest D*, among those with enough to defend if there are any; None when the victim
    adds nothing in any of them. Without the unprotected expert it is the one in which an attacker gets most.
    """

    worst: Trial | None
    trials: tuple[Trial, ...]


@dataclass(frozen=True, kw_only=True)
class Utility(Record):
    """Scores of the models alone on the defended task, and their difference; None without the unprotected expert."""

    expert: float | None
    protected: float
    loss: float | None

    @property
    def points_lost(self) -> str:
        return NO_FIGURE if self.loss is None else f"{100 * self.loss:.1f}"


@dataclass(frozen=True, kw_only=True)
class MatrixCell(Record):
    """The best test score of a recovery with a merge, over free-riders and keys; None where no attack counts."""

    recovery: str | None
    merge: str
    score: float | None
    attacks: int


Front = tuple[tuple[float, float], ...]
"""Test scores on the defended task and on the free-rider's."""


@dataclass(frozen=True, kw_only=True)
class Fronts(Record):
    """The strongest attacker's attacks that no other beats on both tasks, chosen on validation examples."""

    rider: str
    seed: int
    tier: ThreatModel | None = None
    samples: int | None = None
    unprotected: Front
    protected: Front
    without_victim: Front


@dataclass(frozen=True, kw_only=True)
class Excess(Record):
    """What the weights of a release give beyond running it, for one free-rider and one key.

    ``value`` is ``weights``, the test score of the best attack on weights without data, less ``black_box``, that of the
    best attack that only runs the release. Anybody who can run a release has the latter, so a perfect protection has an
    excess of at most 0. The 95 % ``interval`` is a bootstrap over examples, paired across both.
    """

    rider: str
    seed: int
    value: float
    interval: tuple[float, float]
    weights: float
    black_box: float


@dataclass(frozen=True, kw_only=True)
class ProtectionResult(Record):
    """What one protection costs and is worth.

    ``drop_ratio``: as published, per merge without a recovery. ``excess``: of weights over black-box access, for each
    free-rider and key; None where nobody was to run the release.
    """

    is_control: bool
    utility: Utility
    tiers: Mapping[ThreatModel, Verdicts]
    matrix: tuple[MatrixCell, ...]
    drop_ratio: Mapping[str, float | None] = field(default_factory=dict)
    excess: tuple[Excess, ...] | None = field(default=None, metadata=OPTIONAL)
    fronts: tuple[Fronts, ...]

    @property
    def worst_excess(self) -> Excess | None:
        """The largest, over free-riders and keys."""
        return max(self.excess or (), key=lambda excess: excess.value, default=None)


@dataclass(frozen=True, kw_only=True)
class ModelRecord(Record):
    """A model that was made. ``facts``: what protecting or recovering measured.

    ``rider``: the free-rider whose own examples the recovery read; None where it read none.
    """

    protection: str
    seed: int = 0
    recovery: str | None
    rider: str | None = field(default=None, metadata=OPTIONAL)
    cpu_seconds: float
    refusal: str = ""
    facts: Mapping[str, Any] = field(metadata=INLINED)


@dataclass(frozen=True, kw_only=True)
class Line(Record):
    """Scores by task at ``share`` of a variant and the rest of the free-rider's model."""

    protection: str
    seed: int
    recovery: str | None
    rider: str
    share: tuple[float, ...]
    scores: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Control(Record):
    """Something that must hold in every audit. ``bound`` is None where any ``value`` is allowed.

    ``undecided``: it is beyond its bound, by no more than luck with so few examples may be. It has then not failed, and
    shows nothing either.
    """

    name: str
    what: str
    value: float | None
    bound: float | None
    passed: bool
    undecided: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a control that is undecided about nothing."""
        if self.undecided and self.value is None:
            raise ValueError(f"control {self.name} is undecided and has no value")


@dataclass(frozen=True, kw_only=True)
class CellRecord(Record):
    """One set of weights that was scored; ``scores`` by part, None for attacks that no selection would pick.

    ``met``: after how many validation examples of each task it left the race; None where it met all.
    ``credits``: example by example, packed (:mod:`unmergeable.evaluation.packing`), by part and task, of attacks that a
    selection may pick.
    """

    protection: str | None
    seed: int | None
    rider: str
    tier: ThreatModel
    attack: AttackRecord = field(metadata=INLINED)
    met: int | None = field(default=None, metadata=OPTIONAL)
    scores: Mapping[str, Mapping[str, float] | None]
    credits: Mapping[str, Mapping[str, str]] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class Refusal(Record):
    """What could not be done and why. ``protection`` is None for what was done without the victim."""

    protection: str | None
    seed: int | None = field(default=None, metadata=OPTIONAL)
    recovery: str | None = field(default=None, metadata=OPTIONAL)
    rider: str | None = field(default=None, metadata=OPTIONAL)
    merge: str | None = field(default=None, metadata=OPTIONAL)
    samples: int | None = field(default=None, metadata=OPTIONAL)
    learning_rate: float | None = field(default=None, metadata=OPTIONAL)
    reason: str

    def to_json(self) -> dict[str, Any]:
        document = super().to_json()
        if self.protection is None:
            return document
        # ``recovery`` is there also where nothing was undone.
        return {"protection": self.protection, "seed": self.seed, "recovery": self.recovery, **document}


@dataclass(frozen=True)
class SearchPrecision(Record):
    """How far what attackers choose by is from float32, on validation examples of models that are not merged.

    Attributes:
        precision: in which attackers' networks compute.
        changed: share of the credits that are others than in float32.
        largest_difference: of a model's mean score on a task.
    """

    precision: str
    changed: float
    largest_difference: float


@dataclass(frozen=True, kw_only=True)
class AuditResult(Record):
    """An audit.

    Attributes:
        plan: as it was written.
        tasks: kind of each task, and what its scores depend on.
        task: the defended one.
        kept_share: of the free-rider's own skill, which an attack must keep to count.
        alone: mean test scores of models that are not merged, by model and task.
        protections: by name, controls among them.
        passed: whether no control failed; otherwise the figures mean nothing.
        cells: every set of weights that was scored; of a compact result only those that a selection may pick, which are
            enough for :func:`unmergeable.evaluation.recompute.recomputed`. None in older ones that were stored without.
            Both say how many there were (``scored``) and how base and experts were made (``prepared``).
        riders: packed credits of each free-rider's own model on its own task, by part.
        search: None where attackers chose by float32 too.
    """

    plan: Mapping[str, Any]
    environment: Mapping[str, Any]
    digests: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    task: str
    kept_share: float
    alone: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    protections: Mapping[str, ProtectionResult]
    models: tuple[ModelRecord, ...]
    connectivity: tuple[Line, ...]
    controls: tuple[Control, ...]
    passed: bool
    cells: tuple[CellRecord, ...] | None = field(default=None, metadata=OPTIONAL)
    riders: Mapping[str, Mapping[str, str]] | None = field(default=None, metadata=OPTIONAL)
    analyses: Analyses | None = field(default=None, metadata=OPTIONAL)
    refused: tuple[Refusal, ...]
    prepared: Mapping[str, Any] | None = field(default=None, metadata=OPTIONAL)
    search: SearchPrecision | None = field(default=None, metadata=OPTIONAL)
    scored: int | None = field(default=None, metadata=OPTIONAL)

    @property
    def threat_models(self) -> tuple[ThreatModel, ...]:
        return tuple(next(iter(self.protections.values())).tiers)

    @property
    def has_expert(self) -> bool:
        """Whether the unprotected expert was there to compare with; without it there is no D* and no control."""
        return any(protection.utility.expert is not None for protection in self.protections.values())

    @property
    def audited(self) -> dict[str, ProtectionResult]:
        """The protections of the plan, without the controls unless there is nothing else."""
        own = {name: protection for name, protection in self.protections.items() if name not in CONTROLS}
        return own or dict(self.protections)

    @property
    def count(self) -> int:
        """How many sets of weights were scored."""
        return len(self.cells or ()) if self.scored is None else self.scored

    def compact(self, prepared: Mapping[str, Any] | None = None) -> AuditResult:
        """The same to be committed: without the cells that no selection would pick.

        ``prepared``: how base and experts were made.
        """
        kept = tuple(cell for cell in self.cells or () if cell.credits is not None)
        return replace(self, cells=kept, scored=self.count, prepared=prepared)

    @property
    def d_star(self) -> dict[tuple[str, str], float | None]:
        """D* by protection and threat model (``"mergelock", "white_box"``); None where nothing can be said."""
        return {key: None if worst is None else worst.d_star for key, worst in self._worst.items()}

    @property
    def interval(self) -> dict[tuple[str, str], tuple[float | None, float | None]]:
        """The 95 % interval of each D*."""
        return {key: (None, None) if worst is None else worst.interval for key, worst in self._worst.items()}

    @property
    def table(self) -> Table:
        """D* of each protection under each threat model, to be printed."""
        has_excess = any(protection.excess is not None for protection in self.audited.values())
        rows = tuple(
            (
                name,
                protection.utility.points_lost,
                *(star(entry.worst) for entry in protection.tiers.values()),
                *([points(protection.worst_excess)] if has_excess else []),
            )
            for name, protection in self.audited.items()
        )
        columns = ("protection", "points lost alone", *map(str, self.threat_models))
        return Table((*columns, *([EXCESS] if has_excess else [])), rows)

    @property
    def _worst(self) -> dict[tuple[str, str], Trial | None]:
        return {
            (name, model.label): verdicts.worst
            for name, protection in self.audited.items()
            for model, verdicts in protection.tiers.items()
        }


@dataclass(frozen=True)
class Table:
    """Cells as text; the first of each row says what the row is. ``note`` stands below."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(line.rstrip() for line in padded)


def star(worst: Trial | None) -> str:
    """D* with its interval."""
    if worst is None or worst.d_star is None:
        return NO_FIGURE
    low, high = worst.interval
    return f"{worst.d_star:.2f}, 95 % interval {low:.2f} to {high:.2f}"


def points(excess: Excess | None) -> str:
    """An excess with its interval, in points of the defended task."""
    if excess is None:
        return NO_FIGURE
    low, high = (100 * value for value in excess.interval)
    return f"{100 * excess.value:+.1f}, 95 % interval {low:+.1f} to {high:+.1f}"


def read_audit(folder: Path) -> AuditResult:
    """The result of an audit.

    Args:
        folder: of the audit; or a result that is stored as a file.

    Raises:
        BadInput: there is none that is complete.
    """
    path = folder / RESULT if folder.is_dir() else folder
    try:
        return AuditResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; run `unmergeable audit` to its end first.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, BadInput):
        raise BadInput(f"{path} is not the result of an audit; run `unmergeable audit` again.") from None
