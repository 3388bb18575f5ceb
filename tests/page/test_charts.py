"""Charts say what they show, survive what is missing, and their legend looks like their lines."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from unmergeable.page import Chart, Series, landscape_chart, line_chart, point_chart
from unmergeable.page.charts import STYLES
from unmergeable.page.drawing import new_figure, svg

LABELS = {"title": "what <it> shows", "x_label": "across", "y_label": "up"}


def lines(*values: float | None, **options: object) -> Chart:
    series = [Series("one", [0, 1, 2], list(values)), Series("two", [0, 1, 2], [1.0, 2.0, 3.0])]
    return line_chart(series, **LABELS, **options)  # type: ignore[arg-type]


def curve_of(chart: Chart, colour: str) -> str:
    """The path drawn in a colour."""
    found = re.search(rf'<path d="([^"]*)"[^>]*stroke: {colour}', chart.svg)
    assert found is not None
    return found[1]


def test_one_image_with_a_name() -> None:
    chart = lines(1.0, 2.0, 3.0)
    root = ElementTree.fromstring(chart.svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "what <it> shows"
    assert {"across", "up"} <= {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert chart == lines(1.0, 2.0, 3.0), "made again it is the same"


def test_a_name_with_a_dollar_is_a_name_and_no_formula() -> None:
    for name in ("$x$", "100 $ or $\\frac{", "$"):
        chart = line_chart([Series(name, [0, 1], [1.0, 2.0])], title=name, x_label=name, y_label=name)
        texts = [text.text for text in ElementTree.fromstring(chart.svg).iter("{http://www.w3.org/2000/svg}text")]
        assert texts.count(name) == 2, "both axes"


def test_the_legend_has_the_looks_of_the_lines() -> None:
    chart = lines(3.0, 1.0, 2.0)
    assert [key.label for key in chart.keys] == ["one", "two"]
    for key, style in zip(chart.keys, STYLES, strict=False):
        assert key.sample.count(style.colour) == 2
        assert curve_of(chart, style.colour)
        ElementTree.fromstring(key.sample)
    assert chart.keys[0].sample != chart.keys[1].sample.replace(STYLES[1].colour, STYLES[0].colour), "not colour alone"
    assert len({(style.marker, style.dashes) for style in STYLES}) == len(STYLES)


def test_what_is_missing_leaves_a_gap() -> None:
    whole, gap = curve_of(lines(1.0, 2.0, 3.0), STYLES[0].colour), curve_of(lines(1.0, None, 3.0), STYLES[0].colour)
    assert (whole.count("L"), whole.count("M")) == (2, 1)
    assert (gap.count("L"), gap.count("M")) == (0, 2)
    assert lines(None, None, None).svg


def test_what_spans_much_is_logarithmic() -> None:
    """Of 1, 100 and 10 000 the middle one then lies in the middle; control: of 1, 2 and 3 as well, of 0 to 3 not."""

    def heights(chart: Chart) -> list[float]:
        points = re.findall(r"[ML] [\d.]+ ([\d.]+)", curve_of(chart, STYLES[0].colour))
        return [float(y) for y in points]

    for values, is_even in (((1.0, 100.0, 10000.0), True), ((1.0, 2.0, 3.0), True), ((0.0, 100.0, 10000.0), False)):
        low, middle, high = heights(lines(*values))
        assert (abs(middle - (low + high) / 2) < 0.01 * abs(high - low)) == is_even
    low, middle, high = heights(lines(1.0, 10.0, 100.0, y_limits=(1.0, 100.0)))
    assert middle == pytest.approx((low + high) / 2, abs=0.01)


def test_layers_are_whole_numbers() -> None:
    chart = line_chart([Series("one", [1, 2], [1.0, 2.0])], **LABELS)
    ticks = re.findall(r"<text[^>]*>([\d.]+)</text>", chart.svg.split('id="matplotlib.axis_2"')[0])
    assert ticks == ["1", "2"]


@pytest.mark.parametrize(
    "rows",
    [[[1.0, 2.0], [3.0, 4.0]], [[1.0, None], [9e9, 4.0]], [[1.0, 1.0], [1.0, 1.0]], [[None, None], [None, None]]],
    ids=["plain", "missing", "flat", "nothing"],
)
def test_landscapes_of_any_values(rows: list[list[float | None]]) -> None:
    points = [Series("base", [0.0], [0.0]), Series("model", [1.0], [1.0])]
    chart = landscape_chart([0.0, 1.0], [0.0, 1.0], rows, points, **LABELS)
    assert [key.label for key in chart.keys] == ["base", "model"]
    assert "NaN" not in chart.svg
    assert "nan" not in chart.svg


def test_an_outlier_does_not_flatten_a_landscape() -> None:
    """Half of the values are small, and lines are drawn among them; evenly spaced levels would all lie above."""
    rows = [[float(x + 10 * y) for x in range(10)] for y in range(5)] + [[1e6 + x for x in range(10)]] * 5
    chart = landscape_chart(list(range(10)), list(range(10)), rows, [], **LABELS)
    without_axes = re.sub(
        r'<g id="matplotlib.axis_.*?(?=<g id="(?!xtick|ytick|line2d|text))', "", chart.svg, flags=re.S
    )
    labels = [float(text) for text in re.findall(r">([\d.e+]+)</text>", without_axes)]
    assert len([label for label in labels if label < 50]) >= 3


def test_distances_between_points_are_true() -> None:
    """Both axes have one scale: points as far apart across as up are so in the picture."""
    points = [Series(str(n), [x], [y]) for n, (x, y) in enumerate(((0.0, 0.0), (3.0, 0.0), (0.0, 3.0)))]
    chart = point_chart(points, **LABELS)
    at = re.findall(r'<use xlink:href="#[^"]*" x="([\d.]+)" y="([\d.]+)"', chart.svg)
    origin, right, up = [(float(x), float(y)) for x, y in at[-3:]]
    assert math.dist(origin, right) == pytest.approx(math.dist(origin, up), rel=1e-3)
    assert math.dist(right, up) == pytest.approx(math.dist(origin, up) * math.sqrt(2), rel=1e-3)


def test_names_are_no_formulas() -> None:
    """Two dollar signs in a name would be mathematics to matplotlib, and often wrong mathematics."""
    name = r"pays $5_$ at most"
    chart = line_chart([Series("one", [0, 1], [0.0, 1.0])], title=name, x_label=name, y_label=f"task of {name}")
    texts = [text.text for text in ElementTree.fromstring(chart.svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {name, f"task of {name}"} <= set(texts)
    figure, axes = new_figure(2, 2)  # control: taken as it comes, it fails
    axes.set_xlabel(name)
    with pytest.raises(ValueError, match="Exception: Expected"):
        svg(figure)
