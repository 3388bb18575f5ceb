"""Coefficients for parts: which tensor has which, and a search that finds what one coefficient for all cannot."""

from __future__ import annotations

from pathlib import Path

from unmergeable.evaluation.by_part import PARTS, POINTS, ByPart, Point, next_by_part, spread
from unmergeable.ops.opened import open_with_architecture


def test_parts_of_a_network(workshop: Path) -> None:
    """Two layers: the first is early, the second late; what belongs to no block follows the mean."""
    source, architecture = open_with_architecture(workshop / "base")
    by_part = ByPart.of(architecture)
    point = (1.0, 2.0, 3.0, 4.0, 0.5)
    found = {name: by_part.coefficients(name, point)[0] for name in source.names}
    for name, value in found.items():
        assert by_part.coefficients(name, point)[1] == 0.5
        late = ".1." in name
        if "attention" in name and name.endswith("weight"):
            assert value == (2.0 if late else 1.0), name
        elif ("intermediate" in name or "output.dense" in name) and name.endswith("weight"):
            assert value == (4.0 if late else 3.0), name
        elif "norm" in name or "embeddings" in name:
            assert value == 2.5, name
    assert set(found.values()) == {1.0, 2.0, 2.5, 3.0, 4.0}
    # Control: with one coefficient for all parts every tensor has it.
    for name in source.names:
        assert by_part.coefficients(name, spread((0.5, 0.25))) == (0.5, 0.25)


def test_a_spoilt_part_is_left_out() -> None:
    """Score: what three parts give, less what the spoilt one costs; no single coefficient does well."""

    def score(point: Point) -> tuple[float, float]:
        *own, rider = point
        return sum(min(1.0, c) for c in own[:3]) / 3 - own[3] ** 2, 1.0 if rider >= 1 else 0.0

    start = spread((0.5, 1.0))
    scored = {start: score(start)}
    left = POINTS
    while left:
        ranked = sorted(scored, key=lambda point: (scored[point][1], scored[point][0]), reverse=True)
        points = next_by_part(scored, ranked, left, 4)
        if not points:
            break
        assert not set(points) & set(scored)
        scored |= {point: score(point) for point in points}
        left -= len(points)
    assert len(scored) <= 1 + POINTS
    best = max(score(spread((value / 20, 1.0)))[0] for value in range(30))
    assert max(found for found, rider in scored.values() if rider) > best
    assert len(PARTS) == len(start) - 1
