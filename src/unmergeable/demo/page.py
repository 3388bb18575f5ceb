"""The demo's page: one HTML file, no network, pictures as inline SVG, every picture with its numbers beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unmergeable.page import COLOURS, new_figure, plain, render, svg

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Row:
    """One model of the story: accuracies by task (fractions of 1), and a sentence on what happened."""

    model: str
    scores: Mapping[str, float]
    remark: str


@dataclass(frozen=True)
class DistanceCurve:
    """Relative distance of the attention weights to the base, one number for each block."""

    label: str
    values: tuple[float, ...]


def write_page(
    path: Path,
    *,
    rows: Sequence[Row],
    tasks: Mapping[str, str],
    samples: Mapping[str, Images],
    curves: Sequence[DistanceCurve],
    facts: Mapping[str, Any],
) -> None:
    """Render the story.

    Args:
        path: the file to write.
        rows: the models, in the order of the story.
        tasks: title of each task, by the name the scores use.
        samples: a few images of each task, uint8 [n, height, width].
        curves: distances to the base.
        facts: numbers the sentences quote (see ``page.html.j2``).
    """
    text = render(
        "demo/page.html.j2",
        rows=rows,
        tasks=tasks,
        samples={name: [_picture(image) for image in images] for name, images in samples.items()},
        bars=_bars(rows, tasks),
        distances=_distances(curves),
        curves=curves,
        facts=facts,
    )
    path.write_text(text, encoding="utf-8")


def _picture(image: Images) -> str:
    """A small grey image as a data URL."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, image, cmap="gray", vmin=0, vmax=255, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _bars(rows: Sequence[Row], tasks: Mapping[str, str]) -> str:
    """Accuracy of each model on each task, as pairs of horizontal bars."""
    figure, axes = new_figure(8.2, 0.55 * len(rows) + 0.9)
    places = np.arange(len(rows))
    for number, (task, title) in enumerate(tasks.items()):
        offset = (number - (len(tasks) - 1) / 2) * 0.38
        values = [100 * row.scores[task] for row in rows]
        axes.barh(places + offset, values, height=0.36, color=COLOURS[number % len(COLOURS)], label=title)
        for place, value in zip(places, values, strict=True):
            axes.text(value + 0.8, place + offset, f"{value:.0f}", va="center", fontsize=8)
    axes.set_yticks(places, [row.model for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("accuracy on images never trained on, in per cent")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=len(tasks), frameon=False)
    plain(axes)
    return svg(figure)


def _distances(curves: Sequence[DistanceCurve]) -> str:
    """Distance to the base for each block, on a logarithmic scale."""
    figure, axes = new_figure(8.2, 3.2)
    for curve, (marker, style) in zip(curves, (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-.")), strict=False):
        numbers = range(1, len(curve.values) + 1)
        axes.plot(numbers, curve.values, marker=marker, linestyle=style, markersize=4, label=curve.label)
    axes.set_yscale("log")
    axes.set_xlabel("attention block")
    axes.set_ylabel("relative distance to the base")
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.28))
    plain(axes)
    return svg(figure)
