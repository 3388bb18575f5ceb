"""The pictures of an audit's page, each with the table of what it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import isfinite
from typing import TypeVar

from unmergeable.evaluation.analyses import Analyses, LineToRider, MapPoint, ModelAnalysis, Part, Parts, PlaneOfMerges
from unmergeable.evaluation.names import CONTROLS, IDENTITY
from unmergeable.evaluation.results import NO_FIGURE, AuditResult, Fronts, Line, Table
from unmergeable.evaluation.selection import pareto_front
from unmergeable.page import Chart, Series, landscape_chart, line_chart, point_chart

PARTS = {"query_key": "queries and keys", "value_output": "values and output", "feed_forward": "feed-forward"}
FORMS = {"raw": "as released", "canonical": "canonical"}

PERCENT = (-3.0, 103.0)
"""A whole axis of per cent, with room for the markers at its ends."""


Measured = TypeVar("Measured")

Measurement = Callable[[ModelAnalysis], Measured | None]


@dataclass(frozen=True)
class Picture:
    """A chart under a heading, with a caption, and the same as a table."""

    title: str
    caption: str
    chart: Chart
    table: Table


def shown(name: str) -> str:
    """What a protection is called on the page."""
    return "unprotected" if name == IDENTITY else name


def percent(share: float | None) -> str:
    """A share as per cent with one decimal."""
    return NO_FIGURE if share is None or not isfinite(share) else f"{100 * share:.1f}"


def number(value: float | None) -> str:
    """Three digits, or nothing."""
    return NO_FIGURE if value is None or not isfinite(value) else f"{value:.3g}"


def front_picture(name: str, front: Fronts) -> Picture:
    """What the attacker trades: the Pareto fronts of one protection and one free-rider.

    What was on a front of validation examples may not be on that of test examples: the lines join what is, and the
    table has all.
    """
    rider = front.rider
    labels = {"unprotected": "unprotected", "protected": "protected", "without_victim": "without the expert"}
    series, rows = [], []
    for key, label in labels.items():
        own, other = ([point[place] for point in getattr(front, key)] for place in (0, 1))
        best = pareto_front(own, other)
        series.append(Series(label, [100 * other[number] for number in best], [100 * own[number] for number in best]))
        rows += [(label, percent(own), percent(other)) for own, other in getattr(front, key)]
    chart = line_chart(
        series,
        title=f"Pareto fronts against {name}, free-rider {rider}",
        x_label=f"task of {rider}, per cent right",
        y_label="defended task, per cent right",
    )
    columns = ("front", "defended task, %", f"task of {rider}, %")
    note = "Chosen on validation examples; the picture leaves out what another point beats on the test examples."
    caption = "Pareto fronts on test examples."
    return Picture(f"{name}, {rider}", caption, chart, Table(columns, tuple(rows), note))


def line_pictures(result: AuditResult) -> list[Picture]:
    """Errors between each free-rider's model and the expert, one picture per protection and free-rider."""
    lines = result.connectivity
    plain = [line for line in lines if line.protection == IDENTITY and not line.recovery]
    pictures = []
    for name, rider in dict.fromkeys((line.protection, line.rider) for line in lines):
        # The unprotected expert is in every picture, and has one of its own only where nothing is protected.
        if name in CONTROLS and (name != IDENTITY or set(result.protections) - set(CONTROLS)):
            continue
        own = [line for line in lines if (line.protection, line.rider) == (name, rider)]
        first = [line for line in own if line.seed == own[0].seed]
        unprotected = [line for line in plain if line.rider == rider and name != IDENTITY]
        pictures.append(_line_picture([*unprotected, *first], name, rider, result.task))
    return pictures


def _line_picture(lines: Sequence[Line], name: str, rider: str, task: str) -> Picture:
    errors = {_label(line): [None if s is None else 100 * (1 - s) for s in line.scores[task]] for line in lines}
    shares = lines[0].share
    chart = line_chart(
        [Series(label, shares, values) for label, values in errors.items()],
        title=f"Errors on the line from {rider} to {shown(name)}",
        x_label=f"share of the expert ({rider} is 0)",
        y_label="defended task, per cent wrong",
    )
    rows = tuple((label, *(number(value) for value in values)) for label, values in errors.items())
    caption = "Linear mode connectivity, test examples."
    return Picture(f"{shown(name)}, {rider}", caption, chart, Table(_columns("model", shares), rows))


def _label(line: Line) -> str:
    name = shown(line.protection)
    return name if line.recovery is None else f"{name}, after {line.recovery}"


@dataclass(frozen=True)
class Looks:
    """The analyses of an audit, by protection and form."""

    analyses: Analyses

    @property
    def names(self) -> list[str]:
        """Protections that were looked at, the unprotected expert first."""
        return list(dict.fromkeys(model.protection for model in self.analyses.models))

    @property
    def forms(self) -> list[str]:
        """``raw``, and ``canonical`` where there is such a model."""
        present = {model.form for model in self.analyses.models}
        return [form for form in FORMS if form in present]

    def of(
        self, measurement: Measurement[Measured], *, name: str | None = None, form: str | None = None
    ) -> list[tuple[ModelAnalysis, Measured]]:
        """The models of a protection and a form for which a measurement could be made, with the measurement."""
        measured = [(model, measurement(model)) for model in self.analyses.models]
        return [
            (model, value)
            for model, value in measured
            if value is not None and name in (None, model.protection) and form in (None, model.form)
        ]

    @cached_property
    def barriers(self) -> list[Picture]:
        """The loss between each free-rider's model and each model."""
        pictures = []
        riders = self.analyses.models[0].lines if self.analyses.models else {}
        for rider in riders:
            line = partial(_line_to, rider)
            plain = self.of(line, name=IDENTITY, form="raw")
            for name in self.names:
                own = self.of(line, name=name)
                if own and (name != IDENTITY or len(self.names) == 1):
                    pictures.append(_barrier_picture([*(plain if name != IDENTITY else []), *own], name, rider))
        return pictures

    @cached_property
    def scaling(self) -> list[Picture]:
        """What is left of the skill when the task vector is made shorter or longer."""
        return self._skills(
            lambda model: model.scaling,
            lambda curve: (curve.positions, [curve.credits]),
            title="Scaling coefficient curves",
            x_label="scaling coefficient (0 is the base, 1 the model)",
            caption="The base plus so many times the task vector, {form}.",
        )

    @cached_property
    def noise(self) -> list[Picture]:
        """What noise on the weights costs."""
        return self._skills(
            lambda model: model.noise,
            lambda noise: (noise.sizes, noise.credits),
            title="Noise sensitivity",
            x_label="noise, relative to each tensor",
            caption="Mean of {draws} draws, {form}; the band goes from the lowest to the highest.",
            has_band=True,
        )

    @cached_property
    def sharpness(self) -> Table | None:
        """The worst rise of the loss nearby, by protection and form."""
        models = self.of(lambda model: model.sharpness)
        if not models:
            return None
        radii = models[0][1].radii
        rows = [(_named(model), *map(number, sharpness.rises)) for model, sharpness in models]
        return Table(("model", *(f"within {100 * radius:g} %" for radius in radii)), tuple(rows))

    @cached_property
    def distances(self) -> list[Picture]:
        """How far every part of every layer is from the base."""
        known = [block.distance for _, parts in self.of(_parts) for block in parts.blocks if block.distance]
        limits = (min(known) / 1.2, max(known) * 1.2) if known else None
        return self._by_layer(lambda part: part.distance, "relative distance to the base", limits)

    @cached_property
    def directions(self) -> list[Picture]:
        """Whether every part of every layer still points where the expert's task vector did."""
        return self._by_layer(lambda part: part.cosine, "cosine with the expert's", (-1.05, 1.05))

    @cached_property
    def together(self) -> Table | None:
        """Lengths and directions over all layers: a row for each model, two columns for each kind of part."""
        models = self.of(_parts)
        kinds = [part.part for part in models[0][1].together] if models else []
        rows = tuple(
            (_named(model), *(number(v) for part in parts.together for v in (part.norm_ratio, part.cosine)))
            for model, parts in models
        )
        columns = (f"{PARTS[kind]}: {figure}" for kind in kinds for figure in ("length", "cosine"))
        return Table(("model", *columns), rows) if rows else None

    @cached_property
    def landscapes(self) -> list[Picture]:
        """The loss in the plane in which a model is merged."""
        return [_landscape_picture(model, plane) for model, plane in self.of(lambda model: model.landscape)]

    @cached_property
    def maps(self) -> list[Picture]:
        """All models on one plane."""
        return [
            _map_picture(plane.form, plane.points, plane.shares)
            for plane in self.analyses.maps
            if plane.points is not None and plane.shares is not None
        ]

    @cached_property
    def refusals(self) -> list[str]:
        """What could not be measured, and why; equal reasons once."""
        by_reason: dict[str, list[str]] = {}
        for model in self.analyses.models:
            for measurement, reason in model.refused.items():
                by_reason.setdefault(f"{_named(model)}: {reason}", []).append(measurement)
        return [f"{', '.join(measurements)} of {reason}" for reason, measurements in by_reason.items()]

    def _skills(
        self,
        measurement: Measurement[Measured],
        curve: Callable[[Measured], tuple[Sequence[float], Sequence[Sequence[float]]]],
        *,
        title: str,
        x_label: str,
        caption: str,
        has_band: bool = False,
    ) -> list[Picture]:
        """One picture for each form, of the mean over draws of ``curve``: positions, and credits [draws, positions].

        A protection looks the same in both forms, also where one of them is missing.
        """
        pictures = []
        for form in self.forms:
            series, rows = [], []
            curves = [(model.protection, *curve(measured)) for model, measured in self.of(measurement, form=form)]
            for protection, xs, draws in curves:
                at_each = [[value for value in column if isfinite(value)] for column in zip(*draws, strict=True)]
                means = [sum(values) / len(values) if values else None for values in at_each]
                band = [(100 * min(values), 100 * max(values)) if values else (None, None) for values in at_each]
                name, style = shown(protection), self.names.index(protection)
                series.append(Series(name, xs, _percents(means), style, band if has_band else None))
                rows.append((name, *map(percent, means)))
            if curves:
                _, xs, draws = curves[0]
                label = "defended task, per cent right"
                heading = f"{title}, {FORMS[form]}"
                chart = line_chart(series, title=heading, x_label=x_label, y_label=label, y_limits=PERCENT)
                words = caption.format(form=FORMS[form], draws=len(draws))
                pictures.append(Picture(FORMS[form], words, chart, Table(_columns("model", xs), tuple(rows))))
        return pictures

    def _by_layer(
        self, figure: Callable[[Part], float | None], y_label: str, limits: tuple[float, float] | None
    ) -> list[Picture]:
        return [
            _layer_picture(name, models, figure, y_label, limits)
            for name in self.names
            if (models := self.of(_parts, name=name))
        ]


def _parts(model: ModelAnalysis) -> Parts | None:
    return model.parts


def _line_to(rider: str, model: ModelAnalysis) -> LineToRider | None:
    return model.lines[rider]


def _barrier_picture(models: Sequence[tuple[ModelAnalysis, LineToRider]], name: str, rider: str) -> Picture:
    lines = {_named(model): line for model, line in models}
    positions = next(iter(lines.values())).positions
    chart = line_chart(
        [Series(label, positions, line.losses) for label, line in lines.items()],
        title=f"Loss on the line from {rider} to {shown(name)}",
        x_label=f"share of the expert ({rider} is 0)",
        y_label="loss on the defended task, nats",
    )
    rows = tuple((label, number(line.barrier), *map(number, line.losses)) for label, line in lines.items())
    columns = _columns("model", positions)
    table = Table((columns[0], "barrier", *columns[1:]), rows)
    barriers = "; ".join(f"{label} {number(line.barrier)}" for label, line in lines.items())
    return Picture(f"{shown(name)}, {rider}", f"Loss barriers in nats: {barriers}.", chart, table)


def _layer_picture(
    name: str,
    models: Sequence[tuple[ModelAnalysis, Parts]],
    figure: Callable[[Part], float | None],
    y_label: str,
    limits: tuple[float, float] | None,
) -> Picture:
    series = []
    for model, parts in models:
        for kind, title in PARTS.items():
            values = [figure(block) for block in parts.blocks if block.part == kind]
            if values:
                label = f"{title}, {FORMS[model.form]}"
                series.append(Series(label, list(range(1, len(values) + 1)), values))
    chart = line_chart(
        series, title=f"{y_label}, layer by layer: {shown(name)}", x_label="layer", y_label=y_label, y_limits=limits
    )
    layers = max(len(one.xs) for one in series)
    rows = tuple((one.label, *map(number, one.ys), *[NO_FIGURE] * (layers - len(one.ys))) for one in series)
    columns = _columns("part", range(1, layers + 1))
    return Picture(shown(name), f"{y_label.capitalize()}, layer by layer.", chart, Table(columns, rows))


def _landscape_picture(model: ModelAnalysis, plane: PlaneOfMerges) -> Picture:
    rider = model.landscape_rider
    labels = {"base": "base", "rider": rider, "model": shown(model.protection)}
    points = [Series(labels[key], [x], [y]) for key, (x, y) in plane.places.items()]
    title = _named(model)
    chart = landscape_chart(
        plane.xs,
        plane.ys,
        plane.losses,
        points,
        title=f"Loss on the plane through the base, {rider} and {title}",
        x_label=f"from the base to {rider}",
        y_label="across",
    )
    rows = tuple((number(y), *map(number, row)) for y, row in reversed(list(zip(plane.ys, plane.losses, strict=True))))
    places = "; ".join(f"{one.label} at {number(one.xs[0])}, {number(one.ys[0])}" for one in points)
    table = Table(("y \\ x", *map(number, plane.xs)), rows, note=f"{places}.")
    caption = "Loss on the defended task in nats, darker is more; axes in the Frobenius norm of the weights."
    return Picture(title, caption, chart, table)


def _map_picture(form: str, points: Sequence[MapPoint], shares: Sequence[float]) -> Picture:
    first, second = shares
    chart = point_chart(
        [Series(shown(point.name), [point.x], [point.y]) for point in points],
        title=f"All models on their principal plane, {FORMS[form]}",
        x_label=f"first axis, {100 * first:.0f} % of the variance",
        y_label=f"second, {100 * second:.0f} %",
    )
    rows = tuple((shown(point.name), *map(number, (point.x, point.y, point.off_plane))) for point in points)
    caption = f"Weights {FORMS[form]}, in the Frobenius norm."
    return Picture(FORMS[form], caption, chart, Table(("model", "x", "y", "off the plane"), rows))


def _named(model: ModelAnalysis) -> str:
    return f"{shown(model.protection)}, {FORMS[model.form]}"


def _columns(first: str, positions: Iterable[float]) -> tuple[str, ...]:
    return (first, *(f"{position:g}" for position in positions))


def _percents(shares: Iterable[float | None]) -> list[float | None]:
    return [None if share is None else 100 * share for share in shares]
