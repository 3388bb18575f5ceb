"""The pictures of an audit's page, each with the table of what it shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from unmergeable.evaluation.models import IDENTITY, SCALE
from unmergeable.evaluation.worst_case import pareto_front
from unmergeable.page import Chart, Series, landscape_chart, line_chart, point_chart

PARTS = {"query_key": "queries and keys", "value_output": "values and output", "feed_forward": "feed-forward"}
FORMS = {"raw": "as released", "canonical": "canonical"}

NOTHING = "–"

PERCENT = (-3.0, 103.0)
"""A whole axis of per cent, with room for the markers at its ends."""


@dataclass(frozen=True)
class Table:
    """Cells as text; the first of each row says what the row is. ``note`` stands below."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


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
    return NOTHING if share is None else f"{100 * share:.1f}"


def number(value: float | None) -> str:
    """Three digits, or nothing."""
    return NOTHING if value is None else f"{value:.3g}"


def front_picture(name: str, front: Mapping[str, Any]) -> Picture:
    """What the attacker trades: the Pareto fronts of one protection and one free-rider.

    What was on a front of validation examples may not be on that of test examples: the lines join what is, and the
    table has all.
    """
    rider = front["rider"]
    labels = {"unprotected": "unprotected", "protected": "protected", "without_victim": "without the expert"}
    series, rows = [], []
    for key, label in labels.items():
        own, other = ([point[place] for point in front[key]] for place in (0, 1))
        best = pareto_front(own, other)
        series.append(Series(label, [100 * other[number] for number in best], [100 * own[number] for number in best]))
        rows += [(label, percent(own), percent(other)) for own, other in front[key]]
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


def line_pictures(document: Mapping[str, Any]) -> list[Picture]:
    """Errors between each free-rider's model and the expert, one picture per protection and free-rider."""
    lines = document["connectivity"]
    plain = [line for line in lines if line["protection"] == IDENTITY and not line["recovery"]]
    pictures = []
    for name, rider in dict.fromkeys((line["protection"], line["rider"]) for line in lines):
        # The unprotected expert is in every picture, and has one of its own only where nothing is protected.
        if name == SCALE or (name == IDENTITY and len(document["protections"]) > 2):
            continue
        its = [line for line in lines if (line["protection"], line["rider"]) == (name, rider)]
        first = [line for line in its if line["seed"] == its[0]["seed"]]
        unprotected = [line for line in plain if line["rider"] == rider and name != IDENTITY]
        pictures.append(_line_picture([*unprotected, *first], name, rider, document["task"]))
    return pictures


def _line_picture(lines: Sequence[Mapping[str, Any]], name: str, rider: str, task: str) -> Picture:
    errors = {_label(line): [None if s is None else 100 * (1 - s) for s in line["scores"][task]] for line in lines}
    shares = lines[0]["share"]
    chart = line_chart(
        [Series(label, shares, values) for label, values in errors.items()],
        title=f"Errors on the line from {rider} to {shown(name)}",
        x_label=f"share of the expert ({rider} is 0)",
        y_label="defended task, per cent wrong",
    )
    rows = tuple((label, *(number(value) for value in values)) for label, values in errors.items())
    caption = "Linear mode connectivity, test examples."
    return Picture(f"{shown(name)}, {rider}", caption, chart, Table(_columns("model", shares), rows))


def _label(line: Mapping[str, Any]) -> str:
    name = shown(line["protection"])
    return name if line["recovery"] is None else f"{name}, after {line['recovery']}"


@dataclass(frozen=True)
class Looks:
    """The analyses of an audit, by protection and form."""

    analyses: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Protections that were looked at, the unprotected expert first."""
        return list(dict.fromkeys(model["protection"] for model in self.analyses["models"]))

    @property
    def forms(self) -> list[str]:
        """``raw``, and ``canonical`` where there is such a model."""
        present = {model["form"] for model in self.analyses["models"]}
        return [form for form in FORMS if form in present]

    def of(self, measurement: str, *, name: str | None = None, form: str | None = None) -> list[Mapping[str, Any]]:
        """The models of a protection and a form for which this measurement could be made."""
        return [
            model
            for model in self.analyses["models"]
            if model[measurement] is not None and name in (None, model["protection"]) and form in (None, model["form"])
        ]

    @cached_property
    def barriers(self) -> list[Picture]:
        """The loss between each free-rider's model and each model."""
        pictures = []
        riders = self.analyses["models"][0]["lines"] if self.analyses["models"] else {}
        for rider in riders:
            plain = [model for model in self.of("lines", name=IDENTITY, form="raw") if model["lines"][rider]]
            for name in self.names:
                own = [model for model in self.of("lines", name=name) if model["lines"][rider]]
                if own and (name != IDENTITY or len(self.names) == 1):
                    pictures.append(_barrier_picture([*(plain if name != IDENTITY else []), *own], name, rider))
        return pictures

    @cached_property
    def scaling(self) -> list[Picture]:
        """What is left of the skill when the task vector is made shorter or longer."""
        found = []
        for form in self.forms:
            models = self.of("scaling", form=form)
            if models:
                found.append(_scaling_picture(models, form, self._styles))
        return found

    @cached_property
    def noise(self) -> list[Picture]:
        """What noise on the weights costs."""
        found = []
        for form in self.forms:
            models = self.of("noise", form=form)
            if models:
                found.append(_noise_picture(models, form, self._styles))
        return found

    @cached_property
    def sharpness(self) -> Table | None:
        """The worst rise of the loss nearby, by protection and form."""
        models = self.of("sharpness")
        if not models:
            return None
        radii = models[0]["sharpness"]["radii"]
        rows = [
            (f"{shown(model['protection'])}, {FORMS[model['form']]}", *map(number, model["sharpness"]["rises"]))
            for model in models
        ]
        return Table(("model", *(f"within {100 * radius:g} %" for radius in radii)), tuple(rows))

    @cached_property
    def distances(self) -> list[Picture]:
        """How far every part of every layer is from the base."""
        known = [
            block["distance"] for model in self.of("parts") for block in model["parts"]["blocks"] if block["distance"]
        ]
        limits = (min(known) / 1.2, max(known) * 1.2) if known else None
        return self._by_layer("distance", "relative distance to the base", limits)

    @cached_property
    def directions(self) -> list[Picture]:
        """Whether every part of every layer still points where the expert's task vector did."""
        return self._by_layer("cosine", "cosine with the expert's", (-1.05, 1.05))

    @cached_property
    def together(self) -> Table | None:
        """Lengths and directions over all layers: a row for each model, two columns for each kind of part."""
        models = self.of("parts")
        parts = [part["part"] for part in models[0]["parts"]["together"]] if models else []
        rows = tuple(
            (
                _named(model),
                *(number(part[key]) for part in model["parts"]["together"] for key in ("norm_ratio", "cosine")),
            )
            for model in models
        )
        columns = (f"{PARTS[part]}: {figure}" for part in parts for figure in ("length", "cosine"))
        return Table(("model", *columns), rows) if rows else None

    @cached_property
    def landscapes(self) -> list[Picture]:
        """The loss in the plane in which a model is merged."""
        return [_landscape_picture(model) for model in self.of("landscape")]

    @cached_property
    def maps(self) -> list[Picture]:
        """All models on one plane."""
        return [_map_picture(found) for found in self.analyses["maps"] if found["points"] is not None]

    @cached_property
    def refusals(self) -> list[str]:
        """What could not be measured, and why; equal reasons once."""
        found: dict[str, list[str]] = {}
        for model in self.analyses["models"]:
            for measurement, reason in model["refused"].items():
                where = found.setdefault(f"{shown(model['protection'])}, {FORMS[model['form']]}: {reason}", [])
                where.append(measurement)
        return [f"{', '.join(measurements)} of {reason}" for reason, measurements in found.items()]

    @property
    def _styles(self) -> dict[str, int]:
        """A protection looks the same in both forms, also where one of them is missing."""
        return {name: number for number, name in enumerate(self.names)}

    def _by_layer(self, key: str, y_label: str, limits: tuple[float, float] | None) -> list[Picture]:
        return [
            _layer_picture(name, models, key, y_label, limits)
            for name in self.names
            if (models := self.of("parts", name=name))
        ]


def _barrier_picture(models: Sequence[Mapping[str, Any]], name: str, rider: str) -> Picture:
    lines = {_named(model): model["lines"][rider] for model in models}
    positions = next(iter(lines.values()))["positions"]
    chart = line_chart(
        [Series(label, positions, line["losses"]) for label, line in lines.items()],
        title=f"Loss on the line from {rider} to {shown(name)}",
        x_label=f"share of the expert ({rider} is 0)",
        y_label="loss on the defended task, nats",
    )
    rows = tuple((label, number(line["barrier"]), *map(number, line["losses"])) for label, line in lines.items())
    columns = _columns("model", positions)
    table = Table((columns[0], "barrier", *columns[1:]), rows)
    barriers = "; ".join(f"{label} {number(line['barrier'])}" for label, line in lines.items())
    return Picture(f"{shown(name)}, {rider}", f"Loss barriers in nats: {barriers}.", chart, table)


def _scaling_picture(models: Sequence[Mapping[str, Any]], form: str, styles: Mapping[str, int]) -> Picture:
    positions = models[0]["scaling"]["positions"]
    series, rows = [], []
    for model in models:
        name, credited = model["protection"], model["scaling"]["credits"]
        series.append(Series(shown(name), positions, _percents(credited), styles[name]))
        rows.append((shown(name), *map(percent, credited)))
    chart = line_chart(
        series,
        title=f"Scaling coefficient curves, {FORMS[form]}",
        x_label="scaling coefficient (0 is the base, 1 the model)",
        y_label="defended task, per cent right",
        y_limits=PERCENT,
    )
    caption = f"The base plus so many times the task vector, {FORMS[form]}."
    return Picture(FORMS[form], caption, chart, Table(_columns("model", positions), tuple(rows)))


def _noise_picture(models: Sequence[Mapping[str, Any]], form: str, styles: Mapping[str, int]) -> Picture:
    sizes, draws = models[0]["noise"]["sizes"], len(models[0]["noise"]["credits"])
    series, rows = [], []
    for model in models:
        name, credited = model["protection"], model["noise"]["credits"]
        at_each = [[value for value in column if value is not None] for column in zip(*credited, strict=True)]
        means = [sum(values) / len(values) if values else None for values in at_each]
        spread = [(100 * min(values), 100 * max(values)) if values else (None, None) for values in at_each]
        series.append(Series(shown(name), sizes, _percents(means), styles[name], spread))
        rows.append((shown(name), *map(percent, means)))
    chart = line_chart(
        series,
        title=f"Noise sensitivity, {FORMS[form]}",
        x_label="noise, relative to each tensor",
        y_label="defended task, per cent right",
        y_limits=PERCENT,
    )
    caption = f"Mean of {draws} draws, {FORMS[form]}; the band goes from the lowest to the highest."
    return Picture(FORMS[form], caption, chart, Table(_columns("model", sizes), tuple(rows)))


def _layer_picture(
    name: str, models: Sequence[Mapping[str, Any]], key: str, y_label: str, limits: tuple[float, float] | None
) -> Picture:
    series = []
    for model in models:
        for part, title in PARTS.items():
            values = [block[key] for block in model["parts"]["blocks"] if block["part"] == part]
            if values:
                label = f"{title}, {FORMS[model['form']]}"
                series.append(Series(label, list(range(1, len(values) + 1)), values))
    chart = line_chart(
        series, title=f"{y_label}, layer by layer: {shown(name)}", x_label="layer", y_label=y_label, y_limits=limits
    )
    layers = max(len(one.xs) for one in series)
    rows = tuple((one.label, *map(number, one.ys), *[NOTHING] * (layers - len(one.ys))) for one in series)
    columns = _columns("part", range(1, layers + 1))
    return Picture(shown(name), f"{y_label.capitalize()}, layer by layer.", chart, Table(columns, rows))


def _landscape_picture(model: Mapping[str, Any]) -> Picture:
    found, rider = model["landscape"], model["landscape_rider"]
    labels = {"base": "base", "rider": rider, "model": shown(model["protection"])}
    points = [Series(labels[key], [x], [y]) for key, (x, y) in found["places"].items()]
    title = f"{shown(model['protection'])}, {FORMS[model['form']]}"
    chart = landscape_chart(
        found["xs"],
        found["ys"],
        found["losses"],
        points,
        title=f"Loss on the plane through the base, {rider} and {title}",
        x_label=f"from the base to {rider}",
        y_label="across",
    )
    rows = tuple(
        (number(y), *map(number, row)) for y, row in reversed(list(zip(found["ys"], found["losses"], strict=True)))
    )
    places = "; ".join(f"{one.label} at {number(one.xs[0])}, {number(one.ys[0])}" for one in points)
    table = Table(("y \\ x", *map(number, found["xs"])), rows, note=f"{places}.")
    caption = "Loss on the defended task in nats, darker is more; axes in the Frobenius norm of the weights."
    return Picture(title, caption, chart, table)


def _map_picture(found: Mapping[str, Any]) -> Picture:
    points = [(shown(point["name"]), point) for point in found["points"]]
    first, second = found["shares"]
    chart = point_chart(
        [Series(name, [point["x"]], [point["y"]]) for name, point in points],
        title=f"All models on their principal plane, {FORMS[found['form']]}",
        x_label=f"first axis, {100 * first:.0f} % of the variance",
        y_label=f"second, {100 * second:.0f} %",
    )
    rows = tuple((name, *(number(point[key]) for key in ("x", "y", "off_plane"))) for name, point in points)
    caption = f"Weights {FORMS[found['form']]}, in the Frobenius norm."
    return Picture(FORMS[found["form"]], caption, chart, Table(("model", "x", "y", "off the plane"), rows))


def _named(model: Mapping[str, Any]) -> str:
    return f"{shown(model['protection'])}, {FORMS[model['form']]}"


def _columns(first: str, positions: Iterable[float]) -> tuple[str, ...]:
    return (first, *(f"{position:g}" for position in positions))


def _percents(shares: Iterable[float | None]) -> list[float | None]:
    return [None if share is None else 100 * share for share in shares]
