"""Pictures as inline SVG that take their ink from the page, so that they work on light and dark paper."""

from __future__ import annotations

import html
import io
from typing import Any

from unmergeable.errors import UsageError

COLOURS = ("#3b6fb6", "#d9822b")
"""Told apart in grey and by the colour-blind, and readable on light and dark paper."""


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure of this size in inches, and its axes.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("matplotlib is not installed; pip install 'unmergeable[report]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def svg(figure: Any, title: str = "") -> str:
    """The figure as text to put into a page; the same figure gives the same text.

    With a ``title``, a screen reader says it and passes over the numbers on the axes: give those as a table.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "unmergeable", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    if not title:
        return text
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def plain(axes: Any) -> None:
    """Take away the frame's upper and right side."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
