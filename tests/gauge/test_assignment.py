"""The assignment is the best of all, or within a proven gap of it; read off where it can be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from unmergeable.gauge import assignment
from unmergeable.gauge.assignment import Assignment, best_assignment, nearly_best_assignment

SIZE = 80


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(limit: int, *, seed: int) -> Tensor:
    return torch.randint(0, limit, (SIZE, SIZE), generator=torch.Generator().manual_seed(seed)).float()


def correlated(seed: int) -> Tensor:
    """Inner products of units that have much in common, and norms far apart."""
    units = (normal(SIZE, 6, seed=seed) + 1) * torch.exp(normal(SIZE, 1, seed=seed + 1))
    return -units @ (units + 0.1 * normal(SIZE, 6, seed=seed + 2)).T


def contest(seed: int) -> Tensor:
    """Half of the rows want one column less than there are rows in that half."""
    similarity = normal(SIZE, SIZE, seed=seed)
    similarity[: SIZE // 2, : SIZE // 2 - 1] = 1e6
    return similarity


def powers(size: int) -> Tensor:
    """Entries that fall off along rows and columns: who has lost a column bids in ever smaller steps for the next."""
    steps = torch.arange(size) / 10
    return 2.0 ** -(steps[:, None] + steps)


def total(similarity: Tensor, columns: Tensor) -> float:
    """Exactly: the entries are float32, and fsum rounds once."""
    return math.fsum(similarity.gather(1, columns[:, None])[:, 0].tolist())


def shortfall(similarity: Tensor, columns: Tensor) -> float:
    """How far the sum is below the largest, which SciPy knows to a rounding of its own, in float64."""
    assert sorted(columns.tolist()) == list(range(len(similarity)))
    _, best = scipy.optimize.linear_sum_assignment(similarity.numpy(), maximize=True)
    return total(similarity, torch.from_numpy(best)) - total(similarity, columns)


def assert_near(similarity: Tensor, gap: float) -> Assignment:
    before = similarity.clone()
    found = nearly_best_assignment(similarity, gap=gap)
    assert found.columns.dtype == torch.int64
    assert torch.equal(similarity, before)
    rounding = 64 * len(similarity) * torch.finfo(torch.float64).eps * float(similarity.abs().max())
    assert -rounding <= shortfall(similarity, found.columns) <= found.gap + rounding
    assert found.gap <= gap
    return found


@pytest.mark.parametrize("seed", range(20))
def test_is_the_best_of_all_orders(seed: int) -> None:
    similarity = normal(6, 6, seed=seed)
    found = best_assignment(similarity)

    totals = [similarity[range(6), order].sum() for order in itertools.permutations(range(6))]
    assert sorted(found.tolist()) == list(range(6))
    assert similarity[range(6), found].sum() == pytest.approx(float(max(totals)), abs=6 * 2.0**-23 * 6)


@pytest.mark.parametrize("solver", [best_assignment, lambda matrix: nearly_best_assignment(matrix, gap=0).columns])
def test_is_read_off_where_the_best_columns_differ(solver: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(solver)
    monkeypatch.setattr(scipy.optimize, "linear_sum_assignment", None)
    monkeypatch.setattr(assignment, "_auction", None)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))

    assert torch.equal(solver(torch.eye(50)[order]), order.argsort().argsort())
    with pytest.raises(TypeError):  # the control: here it is needed
        solver(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.5]]))


@pytest.mark.parametrize("relative", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["normal", "correlated", "two values", "many ties", "equal columns", "contest"])
def test_is_within_the_gap_it_proves(kind: str, seed: int, relative: float, monkeypatch: pytest.MonkeyPatch) -> None:
    similarity = {
        "normal": lambda: normal(SIZE, SIZE, seed=seed),
        "correlated": lambda: correlated(seed),
        "two values": lambda: integers(2, seed=seed),
        "many ties": lambda: integers(9, seed=seed),
        "equal columns": lambda: normal(SIZE, SIZE // 8, seed=seed).repeat_interleave(8, dim=1),
        "contest": lambda: contest(seed),
    }[kind]()
    monkeypatch.setattr(assignment, "_hungarian", None)  # no help from the exact solver
    found = assert_near(similarity, relative * float(similarity.abs().mean()) * SIZE)
    assert found.gap > 0, "proven by prices, not read off"


def test_an_epsilon_too_large_is_found_out() -> None:
    """The control: one auction with the epsilon of the start is not near the best, and its prices do not say it is."""
    similarity = normal(SIZE, SIZE, seed=0)
    matrix, prices, epsilon = similarity.numpy(), np.zeros(SIZE), 2.0
    columns, left = assignment._auction(matrix, prices, epsilon=epsilon, bids=100 * SIZE)
    assert columns is not None
    assert left > 0

    short = shortfall(similarity, torch.from_numpy(columns))
    assert short > 1.0
    assert short <= assignment._proven_gap(matrix, prices, columns) <= SIZE * epsilon
    assert_near(similarity, 1e-3)


@pytest.mark.parametrize(
    "similarity",
    [
        torch.zeros(1, 1),
        torch.tensor([[-3.0]]),
        torch.zeros(2, 2),
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([[1.0, 2.0], [1.5, 4.0]]),
        torch.zeros(SIZE, SIZE),
        torch.full((SIZE, SIZE), 0.1),
        normal(SIZE, 1, seed=0).expand(SIZE, SIZE).contiguous(),  # rows that do not care
        normal(1, SIZE, seed=0).expand(SIZE, SIZE).contiguous(),  # columns that all want
        normal(SIZE, 1, seed=0) + normal(1, SIZE, seed=1),  # equal sums but for rounding
        torch.eye(SIZE).roll(7, 0) + torch.eye(SIZE).roll(7, 1),
        torch.outer(torch.arange(SIZE), torch.arange(SIZE)).float(),  # the hard case of the Hungarian method
        1e6 + normal(SIZE, SIZE, seed=2),  # entries whose ulp is 1/16
        normal(SIZE, SIZE, seed=3) * 10 ** (8 * normal(SIZE, SIZE, seed=4)),  # from 1e-30 to 1e30
        normal(SIZE, SIZE, seed=5) * 10 ** (8 * normal(SIZE, 1, seed=6)),
        normal(SIZE, SIZE, seed=7) * 3e37,  # the largest numbers that float32 has
        normal(SIZE, SIZE, seed=8) * 1e-42,  # and the smallest
    ],
    ids=lambda matrix: f"{len(matrix)}",
)
@pytest.mark.parametrize("relative", [1e-2, 1e-6, 1e-15, 0.0])
def test_awkward_matrices_come_to_an_end(similarity: Tensor, relative: float) -> None:
    assert_near(similarity, relative * float(similarity.double().abs().mean()) * len(similarity))


def test_the_exact_solver_takes_over_after_too_many_bids(monkeypatch: pytest.MonkeyPatch) -> None:
    similarity = powers(200)
    gap = 1e-6 * float(similarity.mean()) * len(similarity)
    found = assert_near(similarity, gap)
    assert found.gap == 0
    assert torch.equal(found.columns, best_assignment(similarity))

    monkeypatch.setattr(assignment, "_hungarian", None)
    with pytest.raises(TypeError):
        nearly_best_assignment(similarity, gap=gap)
    # The control: it is the number of bids that stopped the auction.
    monkeypatch.setattr(assignment, "BIDS_PER_ROW", 10_000)
    assert_near(similarity, gap)


def test_depends_on_the_matrix_alone() -> None:
    similarity = correlated(0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = nearly_best_assignment(similarity, gap=1e-3)
        torch.set_num_threads(2)
        again = nearly_best_assignment(similarity.clone(), gap=1e-3)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone.columns, again.columns)
    assert alone.gap == again.gap
    assert not torch.equal(alone.columns, nearly_best_assignment(correlated(3), gap=1e-3).columns), "the control"
