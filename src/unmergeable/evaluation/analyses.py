"""Analyses of an audit's models: the figures behind a verdict, each raw and on canonical weights.

What an attacker gets decides; these say why. Every model is looked at as it was released, and as ``nearest_orbit``
leaves it, where the audit has made that: distances, noise and sharpness depend on the basis otherwise
(:mod:`unmergeable.evaluation.analysis`). Loss and credit are those of the defended task, on some of its test examples.

One call looks at one model, in whatever process; each measurement is kept under a name made of what it depends on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from unmergeable.checkpoint.disk import creating, replace_file
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import BadInput, CheckpointError
from unmergeable.evaluation import scoring
from unmergeable.evaluation.analysis import (
    Backpropagate,
    Curve,
    Landscape,
    NoiseSensitivity,
    PartGram,
    Score,
    Scored,
    Sharpness,
    backpropagate_task,
    barrier,
    connectivity,
    grid,
    landscape,
    noise_sensitivity,
    part_grams,
    plane_through,
    principal_plane,
    scaling,
    score_task,
    sharpness,
    taken_together,
    task_vector_gram,
)
from unmergeable.evaluation.cells import identity
from unmergeable.evaluation.models import Variant
from unmergeable.evaluation.names import NOT_THE_EXPERT
from unmergeable.evaluation.plans.analysis_settings import AnalysisSettings
from unmergeable.evaluation.plans.entries import TaskEntry
from unmergeable.evaluation.records import Record
from unmergeable.evaluation.scoring import Checkpoint, ScoredTask
from unmergeable.merges.task_vectors import TaskVectors
from unmergeable.ops.opened import open_base, open_with_architecture
from unmergeable.pools.pool import Call, Pool, run_all
from unmergeable.progress import Progress, silent
from unmergeable.tasks import ChoiceScorer

Form = Literal["raw", "canonical"]

Measured = TypeVar("Measured", bound=Record)

CANONICAL = "nearest_orbit"
"""The recovery that gives canonical weights."""


@dataclass(frozen=True, kw_only=True)
class Part(Record):
    """One kind of part of a block: distances to the base, and its task vector against the expert's."""

    block: str
    part: str
    distance: float | None
    expert_distance: float | None
    norm_ratio: float | None
    cosine: float | None


@dataclass(frozen=True, kw_only=True)
class Parts(Record):
    """All parts, block by block, and each kind over all blocks."""

    blocks: tuple[Part, ...]
    together: tuple[Part, ...]


@dataclass(frozen=True)
class LineToRider(Curve):
    """From a free-rider's model to the one looked at. ``barrier``: the rise above the straight line, in nats."""

    barrier: float | None


@dataclass(frozen=True)
class PlaneOfMerges(Landscape):
    """The plane in which a model is merged. ``places``: where base, free-rider's model (rider) and model lie on it."""

    places: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class ModelAnalysis(Record):
    """All measurements of one model; those that cannot be made are None, and ``refused`` says why."""

    protection: str
    seed: int
    form: str
    parts: Parts | None
    lines: Mapping[str, LineToRider | None]
    scaling: Curve | None
    noise: NoiseSensitivity | None
    sharpness: Sharpness | None
    landscape: PlaneOfMerges | None
    landscape_rider: str
    refused: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class MapPoint(Record):
    """Where a model lies on a plane, and how far off it."""

    name: str
    x: float
    y: float
    off_plane: float


@dataclass(frozen=True, kw_only=True)
class ModelMap(Record):
    """Where all models lie on the plane nearest to them; ``points`` is None where there is no such plane."""

    form: str
    points: tuple[MapPoint, ...] | None
    shares: tuple[float, ...] | None
    refused: str


@dataclass(frozen=True, kw_only=True)
class Analyses(Record):
    """The analyses of an audit; docs/analysis.md explains every entry."""

    task: str
    settings: Mapping[str, Any]
    models: tuple[ModelAnalysis, ...]
    maps: tuple[ModelMap, ...]


@dataclass(frozen=True)
class Subject:
    """A model to look at: what was released under a protection, raw or canonical."""

    protection: str
    seed: int
    form: Form
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Surroundings:
    """What models are looked at against: their base, the expert as it was, free-riders' models by name, and a task."""

    base: Checkpoint
    expert: Checkpoint
    riders: tuple[tuple[str, Checkpoint], ...]
    task: ScoredTask
    settings: AnalysisSettings


def subjects_of(variants: Sequence[Variant]) -> list[Subject]:
    """The unprotected expert and what was released under each protection, for its first key, raw and canonical."""
    first: dict[str, int] = {}
    for variant in variants:
        first.setdefault(variant.protection, variant.seed)
    subjects = []
    for variant in variants:
        form: Form = "raw" if variant.recovery is None else "canonical"
        is_form = variant.recovery is None or variant.facts.get("method") == CANONICAL
        is_first = variant.protection not in NOT_THE_EXPERT and variant.seed == first[variant.protection]
        if variant.checkpoint is not None and is_form and is_first:
            subjects.append(Subject(variant.protection, variant.seed, form, variant.checkpoint))
    return subjects


def analyse(
    subjects: Sequence[Subject], around: Surroundings, folder: Path, pool: Pool, progress: Progress = silent
) -> Analyses:
    """Look at every model.

    Args:
        subjects: the models.
        around: what they are looked at against.
        folder: where measurements are kept; created if it is not there.
        pool: runs the calls.
        progress: called as models are done.

    Raises:
        CheckpointError: a measurement cannot be written.
    """
    with creating(folder):
        folder.mkdir(parents=True, exist_ok=True)
    forms: list[Form] = ["raw", "canonical"]
    maps = [(form, [one for one in subjects if one.form == form]) for form in forms]
    calls: list[Call] = [(look_at, (subject, around, folder)) for subject in subjects]
    calls += [(map_models, (form, tuple(of_form), around, folder)) for form, of_form in maps]
    results = run_all(pool, calls, "analysing", "models", progress)
    return Analyses(
        task=around.task.entry.name,
        settings=asdict(around.settings),
        models=tuple(results[: len(subjects)]),
        maps=tuple(results[len(subjects) :]),
    )


def look_at(subject: Subject, around: Surroundings, folder: Path) -> ModelAnalysis:
    """All measurements of one model.

    Raises:
        CheckpointError: a measurement cannot be written, or the disk fails.
    """
    look, settings, (rider_name, rider) = _Look(subject, around), around.settings, around.riders[0]
    scored = {"task": [around.task.entry.name, around.task.digests["test"]], "examples": settings.examples}
    refused: dict[str, str] = {}

    def made(kind: type[Measured], name: str, compute: Callable[[], Measured], **depends: Any) -> Measured | None:
        models = {"model": subject.checkpoint.digest, "base": around.base.digest}
        try:
            kept = _kept(folder, {"analysis": name, **models, **depends}, lambda: compute().to_json())
        except CheckpointError:
            raise
        except BadInput as error:
            refused[name] = str(error)
            return None
        return kind.from_json(kept)

    parts = made(Parts, "parts", look.parts, expert=around.expert.digest)
    lines = {
        name: made(LineToRider, "line", partial(look.line, other), **scored, rider=other.digest, line=settings.line)
        for name, other in around.riders
    }
    ascent = {"radii": settings.radii, "steps": settings.steps}
    plane = {"rider": rider.digest, "points": settings.points}
    return ModelAnalysis(
        protection=subject.protection,
        seed=subject.seed,
        form=subject.form,
        parts=parts,
        lines=lines,
        scaling=made(Curve, "scaling", look.scaling, **scored, coefficients=settings.coefficients),
        noise=made(NoiseSensitivity, "noise", look.noise, **scored, sizes=settings.noise, draws=settings.draws),
        sharpness=made(Sharpness, "sharpness", look.sharpness, **scored, **ascent),
        landscape=made(PlaneOfMerges, "landscape", partial(look.landscape, rider), **scored, **plane),
        landscape_rider=rider_name,
        refused=refused,
    )


def map_models(form: Form, subjects: Sequence[Subject], around: Surroundings, folder: Path) -> ModelMap:
    """Where all models of one form lie on the plane nearest to them.

    Raises:
        CheckpointError: the measurement cannot be written, or the disk fails.
    """
    models = [(name, checkpoint) for name, checkpoint in around.riders]
    models += [(subject.protection, subject.checkpoint) for subject in subjects]
    recipe = {"analysis": "map", "models": [checkpoint.digest for _, checkpoint in models], "base": around.base.digest}

    def compute() -> dict[str, Any]:
        sources = [open_checkpoint(checkpoint.path) for _, checkpoint in models]
        gram = task_vector_gram(sources, open_checkpoint(around.base.path))
        plane, shares = principal_plane(gram)
        return {"shares": shares, "places": [asdict(place) for place in plane.places(gram)]}

    try:
        located = _kept(folder, recipe, compute)
    except CheckpointError:
        raise
    except BadInput as error:
        return ModelMap(form=form, points=None, shares=None, refused=str(error))
    names = ["base", *(name for name, _ in models)]
    points = tuple(MapPoint(name=name, **place) for name, place in zip(names, located["places"], strict=True))
    return ModelMap(form=form, points=points, shares=tuple(located["shares"]), refused="")


@dataclass(frozen=True)
class _Look:
    """The measurements of one model."""

    subject: Subject
    around: Surroundings

    def parts(self) -> Parts:
        """Distance to the base, and length and direction of the task vector against the expert's, part by part."""
        source, architecture = open_with_architecture(self.subject.checkpoint.path)
        models = [source, open_checkpoint(self.around.expert.path)]
        grams = part_grams(models, open_base(self.around.base.path, source, architecture), architecture)
        together = taken_together(grams, "all")
        return Parts(blocks=tuple(map(_part, grams)), together=tuple(map(_part, together)))

    def line(self, rider: Checkpoint) -> LineToRider:
        """From the free-rider's model to this one."""
        task_vectors = self._task_vectors(self.subject.checkpoint, rider)
        curve = connectivity(self._network, task_vectors, self._score, positions=self.around.settings.line)
        return LineToRider(curve.positions, curve.losses, curve.credits, barrier(curve))

    def scaling(self) -> Curve:
        """From the base through this model."""
        task_vectors = self._task_vectors(self.subject.checkpoint)
        return scaling(self._network, task_vectors, self._score, coefficients=self.around.settings.coefficients)

    def noise(self) -> NoiseSensitivity:
        weights, settings = scoring.state_of(self.subject.checkpoint), self.around.settings
        return noise_sensitivity(self._network, weights, self._score, sizes=settings.noise, draws=settings.draws)

    def sharpness(self) -> Sharpness:
        weights, settings = scoring.state_of(self.subject.checkpoint), self.around.settings
        return sharpness(self._network, weights, self._backpropagate, radii=settings.radii, steps=settings.steps)

    def landscape(self, rider: Checkpoint) -> PlaneOfMerges:
        """The plane in which it is merged with the free-rider's model: that one on the x axis, this one above it."""
        models = (rider, self.subject.checkpoint)
        gram = task_vector_gram([open_checkpoint(m.path) for m in models], open_checkpoint(self.around.base.path))
        plane = plane_through(gram, 0, 1)
        places = [(place.x, place.y) for place in plane.places(gram)]
        xs, ys = (grid(values, self.around.settings.points) for values in zip(*places, strict=True))
        measured = landscape(self._network, self._task_vectors(*models), plane, self._score, xs=xs, ys=ys)
        named = dict(zip(("base", "rider", "model"), places, strict=True))
        return PlaneOfMerges(measured.xs, measured.ys, measured.losses, measured.credits, named)

    @property
    def _network(self) -> Any:
        return scoring.network_of(self.around.base.path)

    def _task_vectors(self, *models: Checkpoint) -> TaskVectors:
        states = [scoring.state_of(model) for model in models]
        return TaskVectors.between(scoring.state_of(self.around.base), states)

    @property
    def _examples(self) -> tuple[TaskEntry, str, Literal["test"], Path, int]:
        task = self.around.task
        limit = min(self.around.settings.examples, task.entry.size("test"))
        return task.entry, task.digests["test"], "test", self.around.base.path, limit

    @property
    def _score(self) -> Score:
        scorer = scoring.scorer_of(*self._examples)
        if isinstance(scorer, ChoiceScorer):
            return partial(score_task, task=scorer.task)  # loss and credit in one pass
        return lambda network: Scored(float(scorer.losses(network).mean()), float(scorer.credits(network).mean()))

    @property
    def _backpropagate(self) -> Backpropagate:
        return partial(backpropagate_task, task=scoring.task_of(*self._examples))


def _kept(folder: Path, recipe: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """The measurement of a recipe: that of an earlier run, or computed now."""
    path = folder / f"{identity(recipe)}.json"
    try:
        return json.loads(path.read_text())["result"]
    except (OSError, ValueError, KeyError, TypeError):
        result = compute()  # it was not made, or its file is not whole
    text = json.dumps({"recipe": recipe, "result": result})
    replace_file(path, text.encode())
    return json.loads(text)["result"]  # lists for tuples, as it will be read


def _part(gram: PartGram) -> Part:
    """Model 0 is the one looked at, 1 the expert as it was."""
    return Part(
        block=gram.block,
        part=gram.part,
        distance=gram.distance(0),
        expert_distance=gram.distance(1),
        norm_ratio=gram.norm_ratio(0, 1),
        cosine=gram.cosine(0, 1),
    )
