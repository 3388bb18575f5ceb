"""Charts for a page: small enough for a telephone, told apart without colour, their legend as text beside them.

A chart is an SVG that is one image for a screen reader, and its keys: what a label's line looks like. The page sets
the keys as text, so that long names wrap instead of running into each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unmergeable.page.drawing import new_figure, plain, svg

WIDTH, HEIGHT = 4.6, 3.0
"""In inches; the page makes pictures as wide as their column, and its type grows and shrinks with them."""

LOGARITHMIC = 50.0
"""Positive values that span a larger ratio are drawn on a logarithmic scale."""


@dataclass(frozen=True)
class Style:
    """How one series looks: told from the others by its marker and dashes as well."""

    colour: str
    marker: str
    dashes: tuple[float, ...]


STYLES = (
    Style("#3b6fb6", "o", ()),
    Style("#d9822b", "s", (5, 2)),
    Style("#7a7a7a", "^", (1.5, 1.5)),
    Style("#2a9d6f", "D", (6, 2, 1.5, 2)),
    Style("#b0489a", "v", (3, 1.5)),
    Style("#8f7400", "P", (8, 2)),
    Style("#4aa3c7", "X", (2, 1, 2, 3)),
    Style("#c0504d", "*", (1.5, 3)),
)
"""All stand out from light and from dark paper."""

_MARKERS = {
    "o": '<circle cx="16" cy="6" r="3.5"/>',
    "s": '<rect x="12.5" y="2.5" width="7" height="7"/>',
    "^": '<path d="M16 2 20 9.5H12z"/>',
    "D": '<path d="M16 1.5 20.5 6 16 10.5 11.5 6z"/>',
    "v": '<path d="M16 10 20 2.5H12z"/>',
    "P": '<path d="M14.5 2h3v2.5H20v3h-2.5V10h-3V7.5H12v-3h2.5z"/>',
    "X": '<path d="M13 2 16 4.5 19 2 20 3 17.5 6 20 9 19 10 16 7.5 13 10 12 9 14.5 6 12 3z"/>',
    "*": '<path d="M16 1.5 17.3 5H21L18 7.2 19.2 11 16 8.7 12.8 11 14 7.2 11 5H14.7z"/>',
}


@dataclass(frozen=True)
class Series:
    """Points in order; None where there is nothing, which leaves a gap. ``style`` is a number into ``STYLES``.

    ``spread`` are the lowest and highest values at each point, drawn as a band.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    style: int | None = None
    spread: Sequence[tuple[float | None, float | None]] | None = None


@dataclass(frozen=True)
class Key:
    """A label of the legend, and a small SVG of what stands for it."""

    label: str
    sample: str


@dataclass(frozen=True)
class Chart:
    """A picture and its legend, in the order of the series."""

    svg: str
    keys: tuple[Key, ...]


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, y_limits: tuple[float, float] | None = None
) -> Chart:
    """Lines through points.

    Args:
        series: at most as many as there are styles look different.
        title: what the picture shows, for those who do not see it.
        x_label, y_label: of the axes. Where all x are whole numbers, so are the marks on the axis.
        y_limits: of the y axis, so that pictures can be compared; None lets the values decide. What spans a large ratio
            is drawn on a logarithmic scale.
    """
    figure, axes = new_figure(WIDTH, HEIGHT)
    for number, one in enumerate(series):
        style = _style(one, number)
        ys = [math.nan if y is None else y for y in one.ys]
        axes.plot(one.xs, ys, marker=style.marker, color=style.colour, markersize=5, linewidth=1.6, **_dashes(style))
        if one.spread is not None:
            low, high = ([math.nan if pair[end] is None else pair[end] for pair in one.spread] for end in (0, 1))
            axes.fill_between(one.xs, low, high, color=style.colour, alpha=0.15, linewidth=0)
    if _spans_much(y_limits or [y for one in series for y in one.ys]):
        axes.set_yscale("log")
    if y_limits is not None:
        axes.set_ylim(*y_limits)
    axes.locator_params(axis="x", nbins=6, integer=all(float(x).is_integer() for one in series for x in one.xs))
    return _finished(figure, axes, title, x_label, y_label, _keys(series))


def landscape_chart(
    xs: Sequence[float],
    ys: Sequence[float],
    rows: Sequence[Sequence[float | None]],
    points: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> Chart:
    """Contour lines of values on a grid, with marked points.

    The levels are quantiles of the values, so that there is as much of the picture between any two: a few enormous
    values in a corner do not flatten the rest.

    Args:
        xs, ys: of the grid.
        rows: a value for each y and x; None where there is none.
        points: each of one point.
        title, x_label, y_label: as for :func:`line_chart`.
    """
    import numpy as np

    figure, axes = new_figure(WIDTH, HEIGHT + 0.4)
    values = np.ma.masked_invalid([[math.nan if value is None else value for value in row] for row in rows])
    levels = np.unique(np.quantile(values.compressed(), np.linspace(0, 1, 9))) if values.count() else np.empty(0)
    if len(levels) > 1:
        axes.contourf(xs, ys, values, levels=levels, colors=[(0.23, 0.44, 0.71, 0.07 * n) for n in range(9)])
        lines = axes.contour(xs, ys, values, levels=levels, colors="#7a7a7a", linewidths=0.8)
        axes.clabel(lines, fmt="%.3g", fontsize=7, colors="#000000")
    for number, one in enumerate(points):
        style = _style(one, number)
        axes.plot(one.xs, one.ys, marker=style.marker, color=style.colour, markersize=9, linestyle="none")
    return _finished(figure, axes, title, x_label, y_label, _keys(points, lines=False))


def point_chart(points: Sequence[Series], *, title: str, x_label: str, y_label: str) -> Chart:
    """Points that are not joined, both axes on one scale."""
    figure, axes = new_figure(WIDTH, HEIGHT)
    for number, one in enumerate(points):
        style = _style(one, number)
        axes.plot(one.xs, one.ys, marker=style.marker, color=style.colour, markersize=8, linestyle="none", alpha=0.8)
    axes.set_aspect("equal", adjustable="datalim")
    return _finished(figure, axes, title, x_label, y_label, _keys(points, lines=False))


def _finished(figure: Any, axes: Any, title: str, x_label: str, y_label: str, keys: tuple[Key, ...]) -> Chart:
    # Names are a user's, and two dollar signs in one are no formula.
    axes.set_xlabel(x_label, parse_math=False)
    axes.set_ylabel(y_label, parse_math=False)
    axes.tick_params(pad=5)  # where both axes begin with a number, the two must not meet
    plain(axes)
    return Chart(svg(figure, title), keys)


def _style(one: Series, number: int) -> Style:
    return STYLES[(number if one.style is None else one.style) % len(STYLES)]


def _dashes(style: Style) -> dict[str, Any]:
    return {"dashes": style.dashes} if style.dashes else {"linestyle": "-"}


def _keys(series: Sequence[Series], *, lines: bool = True) -> tuple[Key, ...]:
    return tuple(Key(one.label, _sample(_style(one, number), lines)) for number, one in enumerate(series))


def _sample(style: Style, has_line: bool) -> str:
    dashes = " ".join(f"{1.6 * length:g}" for length in style.dashes)
    line = (
        f'<path d="M0 6H32" stroke="{style.colour}" stroke-width="2" stroke-dasharray="{dashes}"/>' if has_line else ""
    )
    marker = f'<g fill="{style.colour}">{_MARKERS[style.marker]}</g>'
    return f'<svg class="key" viewBox="0 0 32 12" aria-hidden="true">{line}{marker}</svg>'


def _spans_much(values: Sequence[float | None]) -> bool:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return bool(known) and min(known) > 0 and max(known) > LOGARITHMIC * min(known)
