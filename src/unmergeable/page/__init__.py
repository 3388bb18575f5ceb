"""HTML pages of one file: no network, no script, light and dark, pictures as inline SVG."""

from unmergeable.page.charts import Chart, Key, Series, landscape_chart, line_chart, point_chart
from unmergeable.page.drawing import COLOURS, new_figure, plain, svg
from unmergeable.page.render import render

__all__ = [
    "COLOURS", "Chart", "Key", "Series", "landscape_chart", "line_chart", "new_figure", "plain", "point_chart",
    "render", "svg",
]  # fmt: skip
