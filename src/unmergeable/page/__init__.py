"""HTML pages of one file: no network, no script, light and dark, pictures as inline SVG."""

from unmergeable.page.drawing import COLOURS, new_figure, plain, svg
from unmergeable.page.render import render

__all__ = ["COLOURS", "new_figure", "plain", "render", "svg"]
