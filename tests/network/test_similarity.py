"""A planted rotation, scale and offset are found; what is no similarity is not explained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unmergeable.network.similarity import PairedMoments, Similarity

ROWS, WIDTH = 200, 8


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(first: Tensor, second: Tensor) -> Similarity:
    moments = PairedMoments(WIDTH, torch.device("cpu"))
    for x, y in zip(first.split(30), second.split(30), strict=True):
        moments.add(x, y)
    fit = moments.fit()
    assert fit is not None
    return fit


def test_finds_what_was_planted() -> None:
    rows = drawn(0, ROWS, WIDTH) @ torch.diag(torch.arange(1.0, WIDTH + 1, dtype=torch.float64)) + 3
    rotation, _ = torch.linalg.qr(drawn(1, WIDTH, WIDTH))
    others = 2.5 * rows @ rotation + drawn(2, WIDTH)
    fit = fitted(rows, others)
    # Rounding is amplified by the condition of the cross moments, the squares of 1 to 8.
    bound = 2**-53 * 64 * ROWS * WIDTH**2
    assert float((fit.rotation - rotation).norm()) <= bound
    assert fit.scale == pytest.approx(2.5, rel=bound)
    assert fit.explained == pytest.approx(1.0, abs=bound)
    assert float(fit.distance(rows, others)) <= bound
    assert float(fit.distance(rows + 1, others)) > 1e-3  # the control


def test_the_rest_is_what_is_not_explained() -> None:
    """In units of the spread, least squares leave one less the share explained."""
    rows, others = drawn(0, ROWS, WIDTH), drawn(1, ROWS, WIDTH)
    others = others + 2 * rows
    fit = fitted(rows, others)
    assert float(fit.distance(rows, others)) == pytest.approx(1 - fit.explained, rel=1e-12)
    assert 0.5 < fit.explained < 0.95


def test_chance_explains_little_and_nothing_nothing() -> None:
    assert fitted(drawn(0, ROWS, WIDTH), drawn(1, ROWS, WIDTH)).explained < 0.2
    moments = PairedMoments(WIDTH, torch.device("cpu"))
    moments.add(drawn(0, ROWS, WIDTH), torch.zeros(ROWS, WIDTH))
    assert moments.fit() is None
