"""The plan of an audit: which expert is defended, by what, against which attacks, scored on what.

    base: base
    experts:
      - {name: digits, path: expert-digits, task: digits}
      - {name: animals, path: expert-animals, task: animals}
    protect:
      expert: digits
      methods:
        - mergelock
        - {name: strong, method: mergelock, settings: {condition: 1000}}
        - {name: theirs, checkpoint: their-release}
    merges: [task_arithmetic, ties]
    recoveries: [kabsch, nearest_orbit]
    tasks:
      - {name: digits, data: digits.npz, head: digits-head.safetensors}
      - {name: animals, data: animals.npz, head: animals-head.safetensors}

Every other expert is a free-rider's, each of whom attacks separately. Who has somebody's release and not the expert
writes ``task: digits`` in place of ``expert``: D* is then unknown, and what attackers get is not. ``attacker:
standard`` takes the place of ``merges`` and ``recoveries``: those of :mod:`unmergeable.evaluation.attackers`, which is
also what a plan has that lists none. Paths are relative to the plan; a checkpoint may be ``hub:OWNER/NAME`` too.
Everything that can be wrong with a plan is reported before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from unmergeable.attacks import FewShot
from unmergeable.attacks.few_shot import parse_rates
from unmergeable.errors import BadInput
from unmergeable.evaluation.attackers import DEFAULT, LISTED, Attacker, attacker_named, students
from unmergeable.evaluation.names import BASE, CONTROLS, GIVEN
from unmergeable.evaluation.plans.analysis_settings import AnalysisSettings, read_analysis_settings
from unmergeable.evaluation.plans.entries import (
    ExpertEntry,
    ProtectionEntry,
    RecoveryEntry,
    TaskEntry,
    read_expert,
    read_merge,
    read_protection,
    read_recovery,
    read_task,
)
from unmergeable.evaluation.plans.fields import Entry, read_document, require_named, require_plain, require_unique
from unmergeable.evaluation.plans.plan import Plan
from unmergeable.evaluation.plans.releases import ReleaseEntry, is_release, read_release
from unmergeable.evaluation.race import DOUBT
from unmergeable.evaluation.threat_models import ThreatModel, least
from unmergeable.network.precision import FULL, PRECISIONS, Precision
from unmergeable.settings import configure
from unmergeable.tasks import Classification, Generation, MultipleChoice, Perplexity

Item = TypeVar("Item")

DEFENDED_COEFFICIENTS = (0.2, 0.5, 1.0, 1.5)
RIDER_COEFFICIENTS = (0.0, 0.5, 1.0, 1.5)
REFINEMENTS = 8
CONNECTIVITY = 11

LEARNING_RATES = "1e-5,3e-5,1e-4,3e-4"
"""Lower than those of few_shot alone: on a vision transformer with a head that is not trained, 1e-4 is too much."""

_RATES = {"learning_rates": LEARNING_RATES}

RETRAINING_STEPS = 200
"""More than few_shot's: a whole task is learnt, and not a merge repaired."""

LEARNABLE = (Classification.name, MultipleChoice.name, Generation.name, Perplexity.name)
"""Kinds of task that an attacker can train on."""

FEWEST_SAMPLES = 2

SEEDS = (0, 1)
"""Of the keys that are audited: one alone may be lucky."""

WITHOUT_DATA = (ThreatModel.OFF_THE_SHELF, ThreatModel.WHITE_BOX)
"""The default threat models."""

_TOP = (
    "base", "experts", "protect", "attacker", "merges", "recoveries", "coefficients", "tiers", "threat_models",
    "few_shot", "retrain", "tasks", "seeds", "connectivity", "analyses", "doubt",
    "search_precision",
)  # fmt: skip


@dataclass(frozen=True)
class FewShotEntry:
    """How an attacker with labels trains: ``settings`` are of :class:`unmergeable.attacks.FewShot`.

    Attributes:
        samples: labelled examples of the defended task; with each number the attacker is another one.
        starts: the best merges, each of which is trained.
        settings: that hold for every training.
        trainings: settings of each way to train, where ``settings`` leave them open.
    """

    samples: tuple[int, ...] = (16, 100)
    starts: int = 3
    settings: Mapping[str, Any] = field(default_factory=dict)
    trainings: tuple[Mapping[str, Any], ...] = ({},)

    def methods(self, samples: int) -> tuple[FewShot, ...]:
        """One for each way to train and each learning rate, all different."""
        ways = (configure(FewShot, {**_RATES, **way, **self.settings, "samples": samples}) for way in self.trainings)
        return tuple(dict.fromkeys(method for way in ways for method in _one_for_each_rate(way)))


@dataclass(frozen=True)
class RetrainEntry:
    """How an attacker trains its own task into a release: ``settings`` are of :class:`unmergeable.attacks.FewShot`.

    Attributes:
        samples: labelled examples of the defended task, shown again so that it is not forgotten; with each number the
            attacker is another one.
        own_examples: the most examples of its own task.
    """

    samples: tuple[int, ...] = (100,)
    own_examples: int = 1000
    settings: Mapping[str, Any] = field(default_factory=dict)

    def methods(self, samples: int) -> tuple[FewShot, ...]:
        """One for each learning rate."""
        settings = {**_RATES, "steps": RETRAINING_STEPS, **self.settings, "samples": samples}
        return _one_for_each_rate(configure(FewShot, settings))


def _one_for_each_rate(method: FewShot) -> tuple[FewShot, ...]:
    return tuple(replace(method, learning_rates=repr(rate)) for rate in parse_rates(method.learning_rates))


@dataclass(frozen=True)
class Grid:
    """The coarse grid of the defended expert's and the free-rider's coefficient, and how many points refine it.

    ``extends``: whether the search leaves it where the best lie on its edge.
    """

    defended: tuple[float, ...] = DEFENDED_COEFFICIENTS
    rider: tuple[float, ...] = RIDER_COEFFICIENTS
    refinements: int = REFINEMENTS
    extends: bool = False


@dataclass(frozen=True, kw_only=True)
class AuditPlan(Plan):
    """An audit, checked.

    Attributes:
        defended: name of the expert as it was before it was protected; None where nobody has it.
        task_without_expert: the defended task, where it is not the expert that names it.
        doubt: the largest probability with which the race of attacks drops the attacker's choice; 0 for no race.
        search_precision: in which networks compute while attackers choose and train. Tests are always in float32.
        connectivity: points of the line between two models that are scored, its ends among them; 0 for none.
        analyses: None for an audit without.
    """

    defended: str | None
    attacker: Attacker
    task_without_expert: str | None = None
    coefficients: Grid
    doubt: float
    search_precision: Precision = FULL
    threat_models: tuple[ThreatModel, ...]
    few_shot: FewShotEntry
    retrain: RetrainEntry
    seeds: tuple[int, ...]
    connectivity: int
    analyses: AnalysisSettings | None

    @property
    def strongest(self) -> ThreatModel:
        """Of those who merge the release."""
        return least(model for model in self.threat_models if model.merges)

    def reaches(self, model: ThreatModel) -> bool:
        """Whether one of the attackers has all that is had under ``model``."""
        return any(attacker.includes(model) for attacker in (self.strongest, *self.threat_models))

    @property
    def has_expert(self) -> bool:
        """Whether the unprotected expert is there, with which everything is compared."""
        return self.defended is not None

    @property
    def victim(self) -> ExpertEntry:
        """The defended expert, which must be there."""
        assert self.defended is not None
        return self.expert(self.defended)

    @property
    def defended_task(self) -> str:
        return self.task_without_expert or self.victim.task

    def as_released(self) -> Iterable[tuple[ProtectionEntry, ExpertEntry]]:
        return [(entry, self.victim) for entry in self.protections]

    def labelled(self, task: TaskEntry) -> int:
        """Of the defended task as many as the attacker with most has, of its own at least one."""
        if not self.strongest.trains:
            return 0
        return max(self.few_shot.samples) if task.name == self.defended_task else 1

    @property
    def riders(self) -> tuple[ExpertEntry, ...]:
        return tuple(expert for expert in self.experts if expert.name != self.defended)


def read_plan(path: Path, root: Path | None = None) -> AuditPlan:
    """A plan from its YAML file; ``root`` is where its relative paths start, its folder when None.

    Raises:
        BadInput: the file cannot be read; an entry is missing, misspelt or means nothing; a path leads nowhere; two
            things have one name. One line, before any compute.
        UsageError: a setting that its method does not have.
    """
    return parse_plan(read_document(path, "docs/audit.md"), root or path.parent, str(path))


def parse_plan(document: object, folder: Path, where: str = "the plan") -> AuditPlan:
    """A plan from its parsed document; ``folder`` is where its paths start. Raises what :func:`read_plan` does."""
    require_plain(document, where)
    top = Entry(document, _TOP, where)
    base = top.checkpoint("base", folder)
    protect = Entry(top.document("protect"), ("expert", "task", "methods"), f"{where}, protect")
    if "expert" in protect and "task" in protect:
        raise BadInput(f"{protect.where}: give either expert, which has a task, or task where nobody has the expert.")
    has_expert = "task" not in protect
    methods = protect.listed("methods", partial(_read_method, folder=folder))
    known = ("defended", "rider", "refinements", "extends")
    grid = Entry(top.document("coefficients", {}), known, f"{where}, coefficients")
    attacker = _attacker(top)
    plan = AuditPlan(
        base=base,
        experts=top.listed("experts", partial(read_expert, folder=folder)),
        defended=protect.text("expert") if has_expert else None,
        task_without_expert=None if has_expert else protect.text("task"),
        protections=tuple(method for method in methods if isinstance(method, ProtectionEntry)),
        releases=tuple(method for method in methods if isinstance(method, ReleaseEntry)),
        attacker=attacker,
        merges=_menu(top, "merges", read_merge, attacker),
        recoveries=(
            *_menu(top, "recoveries", partial(read_recovery, folder=folder), attacker),
            *_students(top, folder),
        ),
        coefficients=Grid(
            grid.numbers("defended", DEFENDED_COEFFICIENTS),
            grid.numbers("rider", RIDER_COEFFICIENTS),
            grid.whole("refinements", REFINEMENTS, least=0),
            grid.flag("extends") if "extends" in grid else attacker.extends,
        ),
        doubt=_doubt(top),
        search_precision=_search_precision(top),
        threat_models=_threat_models(top),
        few_shot=_few_shot(top, attacker),
        retrain=_retrain(top),
        tasks=top.listed("tasks", partial(read_task, folder=folder, base=base)),
        seeds=tuple(_seeds(top)),
        connectivity=_connectivity(top),
        analyses=read_analysis_settings(top.document("analyses"), f"{where}, analyses"),
        document=dict(document) if isinstance(document, Mapping) else {},
    )
    plan.require_names(where, [] if plan.defended is None else [plan.defended])
    if plan.task_without_expert is not None:
        _require_no_expert(plan, where)
    _require_consistent(plan, where)
    return plan


def _read_method(item: object, where: str, folder: Path) -> ProtectionEntry | ReleaseEntry:
    return read_release(item, where, folder) if is_release(item) else read_protection(item, where, folder)


def _attacker(top: Entry) -> Attacker:
    """The attacker that the plan names, or lists; the default one where it leaves something open."""
    lists = [value for key in ("merges", "recoveries") if (value := top.document(key)) is not None]
    named = [value for value in lists if isinstance(value, str)]
    if "attacker" in top:
        if lists:
            raise BadInput(f"{top.where}: attacker stands for merges and recoveries; leave these out, or attacker.")
        return attacker_named(top.text("attacker"), f"{top.where}, attacker")
    if named:
        key = "merges" if top.document("merges") == named[0] else "recoveries"
        return attacker_named(named[0], f"{top.where}, {key}")
    if len(lists) == 2:
        return Attacker(LISTED, (), ())
    return attacker_named(DEFAULT, top.where)


def _menu(top: Entry, key: str, read: Callable[[object, str], Item], attacker: Attacker) -> tuple[Item, ...]:
    """A list of the plan, or the one that its attacker has."""
    value = top.document(key)
    if value is None or isinstance(value, str):
        whose = attacker if value is None else attacker_named(value, f"{top.where}, {key}")
        methods: tuple[str, ...] = getattr(whose, key)
        return tuple(read(method, f"{top.where}, {key}") for method in methods)
    return top.listed(key, read, default=() if key == "recoveries" else None)


def _students(top: Entry, folder: Path) -> tuple[RecoveryEntry, ...]:
    """What an attacker who only runs the release does to it, where the plan lists no recoveries of its own."""
    if isinstance(top.document("recoveries"), list) or ThreatModel.BLACK_BOX not in _threat_models(top):
        return ()
    return tuple(
        read_recovery(student, f"{top.where}, recoveries", folder) for student in students(_search_precision(top))
    )


def _threat_models(top: Entry) -> tuple[ThreatModel, ...]:
    if "tiers" in top and "threat_models" in top:
        raise BadInput(f"{top.where}: tiers is the older name of threat_models; give one of them.")
    key = "tiers" if "tiers" in top else "threat_models"
    if top.document(key) == []:
        raise BadInput(f"{top.where}, {key}: none is left; known: {', '.join(map(str, ThreatModel))}.")
    try:
        named = [ThreatModel.named(text) for text in top.texts(key, [model.label for model in WITHOUT_DATA])]
    except BadInput as error:
        raise BadInput(f"{top.where}, {key}: {error}") from None
    return tuple(model for model in ThreatModel if model in named)


def _few_shot(top: Entry, attacker: Attacker) -> FewShotEntry:
    default = FewShotEntry()
    entry = Entry(top.document("few_shot", {}), ("samples", "starts", "settings"), f"{top.where}, few_shot")
    samples, settings = _training(entry, default.samples)
    few_shot = FewShotEntry(samples, entry.whole("starts", default.starts), settings, attacker.trainings)
    few_shot.methods(FEWEST_SAMPLES)
    return few_shot


def _retrain(top: Entry) -> RetrainEntry:
    default = RetrainEntry()
    entry = Entry(top.document("retrain", {}), ("samples", "own_examples", "settings"), f"{top.where}, retrain")
    samples, settings = _training(entry, default.samples)
    retrain = RetrainEntry(samples, entry.whole("own_examples", default.own_examples), settings)
    retrain.methods(FEWEST_SAMPLES)
    return retrain


def _training(entry: Entry, samples: tuple[int, ...]) -> tuple[tuple[int, ...], Mapping[str, Any]]:
    """Numbers of labelled examples, and settings of the training on them."""
    numbers = entry.numbers("samples", samples)
    if not all(number.is_integer() and number >= FEWEST_SAMPLES for number in numbers):
        raise entry.wrong("samples", f"must be whole numbers of at least {FEWEST_SAMPLES}", list(numbers))
    settings = entry.mapping("settings")
    if "samples" in settings:
        raise BadInput(f"{entry.where}, settings: samples stands beside settings, as a list.")
    return tuple(map(int, numbers)), settings


def _doubt(top: Entry) -> float:
    doubt = top.document("doubt", DOUBT)
    if isinstance(doubt, bool) or not isinstance(doubt, int | float) or not 0 <= doubt < 1:
        raise top.wrong("doubt", "must be a number from 0, which leaves no attack out, to below 1", doubt)
    return float(doubt)


def _search_precision(top: Entry) -> Precision:
    given = top.text("search_precision", FULL)
    require_named(given, PRECISIONS, "precision", f"{top.where}, search_precision")
    return next(precision for precision in PRECISIONS if precision == given)


def _connectivity(top: Entry) -> int:
    """Points of a line; a line has two ends and something between them."""
    points = top.whole("connectivity", CONNECTIVITY, least=0)
    if points in (1, 2):
        raise top.wrong("connectivity", "must be at least 3, or 0 to leave it out", points)
    return points


def _seeds(top: Entry) -> list[int]:
    seeds = top.document("seeds", list(SEEDS))
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise top.wrong("seeds", "must be a list of whole numbers", seeds)
    return seeds


def _require_free_names(plan: AuditPlan, where: str) -> None:
    """Raises BadInput for a name that the audit itself gives."""
    taken = {"experts": (BASE,), "protections": CONTROLS, "releases": CONTROLS, "recoveries": (GIVEN,)}
    for kind, names in taken.items():
        for entry in getattr(plan, kind):
            if entry.name in names:
                raise BadInput(f"{where}, {kind}: {entry.name!r} is what every audit calls one of its own; rename it.")


def _require_no_expert(plan: AuditPlan, where: str) -> None:
    """What cannot be done without the unprotected expert is not asked for."""
    require_named(str(plan.task_without_expert), [task.name for task in plan.tasks], "task", f"{where}, protect")
    for entry in plan.protections:
        raise BadInput(
            f"{where}, protect: {entry.name} needs an expert to be applied to; name it as expert, in place of task."
        )
    if plan.analyses is not None:
        raise BadInput(f"{where}, analyses: they compare with the unprotected expert; name it, or leave them out.")


def _require_consistent(plan: AuditPlan, where: str) -> None:
    _require_free_names(plan, where)
    require_unique([str(seed) for seed in plan.seeds], f"{where}, seeds")
    if not plan.riders:
        raise BadInput(f"{where}, experts: nobody to merge with; add a free-rider's expert.")
    for rider in plan.riders:
        if rider.task == plan.defended_task:
            raise BadInput(f"{where}, expert {rider.name}: it has the defended task; a free-rider lacks that skill.")
    if 1.0 not in plan.coefficients.defended:
        raise BadInput(f"{where}, coefficients: defended must contain 1.0, or the expert is never used as it was made.")
    _require_attacks(plan, where)
    _require_examples(plan, where)


def _require_attacks(plan: AuditPlan, where: str) -> None:
    """No verdict on an attacker who has not attacked."""
    if plan.reaches(ThreatModel.WHITE_BOX) and not any(entry.threat_model.merges for entry in plan.recoveries):
        raise BadInput(
            f"{where}, recoveries: there are none, and an attacker of threat model {ThreatModel.WHITE_BOX} undoes what "
            "was done; leave the entry out for the standard ones, or give `threat_models: [off_the_shelf]` to claim "
            "nothing about it."
        )
    for merge in plan.merges:
        merge.require_experts(2, where)
    for kind, entries in (("recovery", plan.recoveries), ("merge", plan.merges)):
        for entry in entries:
            if entry.threat_model == ThreatModel.UNLABELLED and not plan.reaches(entry.threat_model):
                raise BadInput(
                    f"{where}, {kind} {entry.name}: it needs data, which threat model unlabelled (T3) has; add it to "
                    "threat_models."
                )
    students = [entry.name for entry in plan.recoveries if entry.threat_model == ThreatModel.BLACK_BOX]
    if students and not plan.reaches(ThreatModel.BLACK_BOX):
        raise BadInput(
            f"{where}, recovery {students[0]}: it only runs the release, as threat model black_box does; add that to "
            "threat_models."
        )
    if plan.reaches(ThreatModel.BLACK_BOX) and not students:
        raise BadInput(
            f"{where}, recoveries: none only runs the release, which is all that threat model black_box may do; add "
            "distil, or leave black_box out."
        )


def _require_examples(plan: AuditPlan, where: str) -> None:
    trains = any(model.trains for model in plan.threat_models)
    for task in plan.tasks:
        if trains and task.kind.name not in LEARNABLE:
            raise BadInput(
                f"{where}, task {task.name}: threat models few_shot, unlabelled and retrain learn from "
                f"{', '.join(LEARNABLE)}, not from {task.kind.name}; leave them out."
            )
        if trains and task.train is None:
            raise BadInput(
                f"{where}, task {task.name}: threat models few_shot, unlabelled and retrain learn from examples; give "
                "train."
            )
        if task.train in (task.validation, task.test) and not task.is_split:
            raise BadInput(f"{where}, task {task.name}: train must be other data than validation and test.")
    for recovery in plan.recoveries:
        read = [plan.defended_task] if "defended" in recovery.examples else []
        for name in (*read, *(rider.task for rider in plan.riders if "own" in recovery.examples)):
            task = plan.task(name)
            if task.train is None or task.is_split:
                raise BadInput(
                    f"{where}, task {task.name}: recovery {recovery.name} reads examples; give them as train, a file "
                    "of their own."
                )
