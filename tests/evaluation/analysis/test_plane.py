"""Planes are where the models are, at their true distances, and a quadratic looks like one on them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from evaluation.analysis.quadratic import State, inner, minus, quadratic, score, state
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import BadInput
from unmergeable.evaluation.analysis import grid, landscape, plane_through, principal_plane, task_vector_gram
from unmergeable.evaluation.analysis.plane import Plane
from unmergeable.merges.task_vectors import TaskVectors

BASE, MODELS = state(1), [state(2), state(3), state(4)]


def gram_of(models: list[State], base: State = BASE) -> torch.Tensor:
    sources = [MemorySource(model, {}, Path(f"model {number}")) for number, model in enumerate(models)]
    return task_vector_gram(sources, MemorySource(base, {}, Path("base")))


def weights_at(plane: Plane, x: float, y: float, models: list[State]) -> State:
    return {
        name: BASE[name]
        + sum(c * (m[name] - BASE[name]) for c, m in zip(plane.coefficients(x, y), models, strict=True))
        for name in BASE
    }


def length(first: State, second: State) -> float:
    away = minus(first, second)
    return math.sqrt(inner(away, away))


def test_the_gram_matrix_is_that_of_the_task_vectors() -> None:
    gram = gram_of(MODELS)
    for row, ours in enumerate(MODELS):
        for column, theirs in enumerate(MODELS):
            expected = inner(minus(ours, BASE), minus(theirs, BASE))
            assert float(gram[row, column]) == pytest.approx(expected, rel=1e-12)


def test_a_plane_through_three_models_holds_them() -> None:
    gram = gram_of(MODELS)
    plane = plane_through(gram, 0, 2)
    base, first, other, second = plane.places(gram)
    assert (base.x, base.y, base.off_plane) == (0, 0, 0)
    assert first.x == pytest.approx(length(MODELS[0], BASE), rel=1e-12)
    assert first.y == pytest.approx(0, abs=1e-9)
    assert second.y > 0
    for place in (first, second):
        assert place.off_plane == pytest.approx(0, abs=1e-6)
    assert math.dist((first.x, first.y), (second.x, second.y)) == pytest.approx(length(MODELS[0], MODELS[2]), rel=1e-9)
    assert other.off_plane > 1, "the third model lies off it"  # control
    reach = math.hypot(other.x, other.y, other.off_plane)
    assert reach == pytest.approx(length(MODELS[1], BASE), rel=1e-9)


@pytest.mark.parametrize("kind", ["through", "principal"])
def test_distances_in_a_plane_are_those_of_weights(kind: str) -> None:
    gram = gram_of(MODELS)
    plane = plane_through(gram, 1, 2) if kind == "through" else principal_plane(gram)[0]
    points = [(0.0, 0.0), (1.0, 0.0), (-2.0, 3.0)]
    for one in points:
        for two in points:
            found = length(weights_at(plane, *one, MODELS), weights_at(plane, *two, MODELS))
            assert found == pytest.approx(math.dist(one, two), rel=1e-9, abs=1e-9)


def test_the_principal_plane_leaves_the_least_off_it() -> None:
    """Two models and the base lie on a plane; of four points the principal plane leaves the third variance."""
    exact, shares = principal_plane(gram_of(MODELS[:2]))
    assert all(place.off_plane == pytest.approx(0, abs=1e-6) for place in exact.places(gram_of(MODELS[:2])))
    assert sum(shares) == pytest.approx(1, rel=1e-9)
    gram = gram_of(MODELS)
    plane, shares = principal_plane(gram)
    flat = torch.stack([torch.cat([model[name].flatten() for name in model]) for model in (BASE, *MODELS)])
    variances = torch.linalg.svdvals(flat - flat.mean(dim=0)).square()
    off = sum(place.off_plane**2 for place in plane.places(gram))
    assert off == pytest.approx(float(variances[2:].sum()), rel=1e-9)
    assert shares == pytest.approx((variances[:2] / variances.sum()).tolist(), rel=1e-9)
    other = plane_through(gram, 0, 1)
    centred = Plane(plane.origin, other.first, other.second)
    assert sum(place.off_plane**2 for place in centred.places(gram)) > 1.01 * off  # control


def test_the_landscape_of_a_quadratic_is_a_quadratic() -> None:
    network, models = quadratic(), MODELS[:2]
    gram = gram_of(models)
    plane = plane_through(gram, 0, 1)
    xs, ys = (-1.0, 0.0, 2.5), (0.5, 1.5)
    found = landscape(network, TaskVectors.between(BASE, models), plane, score, xs=xs, ys=ys)
    assert (len(found.losses), len(found.losses[0])) == (2, 3)
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            away = minus(weights_at(plane, x, y, models), network.minimum)
            assert found.losses[row][column] == pytest.approx(0.5 * inner(away, away, network.curvature), rel=1e-9)
            assert found.credits[row][column] == -found.losses[row][column]


def test_models_on_a_line_have_no_plane() -> None:
    along = {name: BASE[name] + 2 * (MODELS[0][name] - BASE[name]) for name in BASE}
    for models in ([MODELS[0], along], [MODELS[0], BASE], [BASE, MODELS[0]]):
        with pytest.raises(BadInput, match="on one line"):
            plane_through(gram_of(models), 0, 1)
        with pytest.raises(BadInput, match="on one line"):
            principal_plane(gram_of(models))


def test_models_without_a_common_tensor_are_refused() -> None:
    with pytest.raises(BadInput, match="no tensor in common"):
        task_vector_gram([MemorySource({"other": torch.zeros(2)}, {})], MemorySource(BASE, {}))


def test_a_grid_covers_its_values() -> None:
    assert grid([1.0, 3.0, 2.0], 5) == pytest.approx((0.5, 1.25, 2.0, 2.75, 3.5))
