"""Which solver for the assignment of `params`: exact ones against an auction whose distance from the optimum is proven.

    python benchmarks/assignment_solvers.py [--sizes 1536 11008 …] [--solvers scipy lapjv auction] [--hidden 1024]

`params` looks, in every layer, for the order of hidden units furthest from the base's: the least sum of inner products
between units of the base (rows) and of the expert (columns). The units here are drawn: rows of gate and up and columns
of down on ``hidden`` coordinates, with a common part and norms that differ as those of trained networks do; the expert
is the base plus a tenth of its size. Inner products are float32, as in ``params``.

    scipy     scipy.optimize.linear_sum_assignment (Crouse 2016), what recoveries use
    lapjv     of the package ``lapx`` (Jonker and Volgenant 1987), which is no dependency; left out if not installed
    auction   unmergeable.gauge.assignment.nearly_best_assignment, what ``params`` uses, at its settings

Every solver has a process of its own: CPU seconds of the solver alone on one thread, and how far its memory rises above
the matrix that it is given (up to 100 MB or so it fits in what making the matrix has left, and is not seen). ``gap`` is
how far a sum is above the least one found, in units of that sum, and ``proven`` how far it can be above the optimum at
most, by the prices of the auction.

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from unmergeable.gauge.assignment import nearly_best_assignment
from unmergeable.protections.params import NEAR

Matrix = npt.NDArray[np.float32]
Columns = npt.NDArray[np.int64]
Solution = tuple[Columns, float | None]
"""Column by row; and how far the sum can be above the least one, where the solver says so."""

CHANGE = 0.1
"""Size of the expert's task vector beside the base's weights."""

SPREAD, COMMON = 0.3, 0.3
"""Of the norms of units, as the logarithm's standard deviation; and of what all units share."""


def cost_matrix(size: int, hidden: int) -> Matrix:
    """Inner products of the base's units (rows) with the expert's (columns), float32 [size, size]."""
    generator = torch.Generator().manual_seed(size)
    cost = torch.zeros(size, size)
    norms = torch.exp(SPREAD * torch.randn(size, 1, generator=generator)) / hidden**0.5
    for _ in ("gate", "up", "down"):
        common = COMMON * torch.randn(1, hidden, generator=generator)
        base = norms * (torch.randn(size, hidden, generator=generator) + common)
        expert = base + CHANGE * norms * torch.randn(size, hidden, generator=generator)
        cost.addmm_(base, expert.T)
    return cost.numpy()


def scipy_solver(cost: Matrix) -> Solution:
    """SciPy's: makes a float64 copy."""
    solve = importlib.import_module("scipy.optimize").linear_sum_assignment
    return solve(cost)[1], None


def lapjv_solver(cost: Matrix) -> Solution:
    """``lap.lapjv``."""
    columns, _ = importlib.import_module("lap").lapjv(cost, return_cost=False)
    return np.asarray(columns, dtype=np.int64), None


def auction(cost: Matrix) -> Solution:
    """As ``params`` asks for it: base and expert are close, their inner products nearly half the squares of both."""
    gap = NEAR * abs(float(np.trace(cost, dtype=np.float64)))
    similarity = torch.from_numpy(cost).neg_()
    found = nearly_best_assignment(similarity, gap=gap)
    similarity.neg_()  # the memory is the cost's
    return found.columns.numpy(), found.gap


def _total(cost: Matrix, columns: Columns) -> float:
    return float(np.take_along_axis(cost, columns[:, None], axis=1).sum(dtype=np.float64))


SOLVERS: dict[str, Callable[[Matrix], Solution]] = {"scipy": scipy_solver, "lapjv": lapjv_solver, "auction": auction}


def child(solver: str, size: int, hidden: int) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    torch.set_num_threads(1)
    cost = cost_matrix(size, hidden)
    solve = SOLVERS[solver]
    solve(np.random.default_rng(0).random((64, 64), dtype=np.float32))  # what is imported late counts for nobody
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, began = _peak(), time.process_time()
    columns, gap = solve(cost)
    seconds = time.process_time() - began
    peak = _peak()
    total = _total(cost, columns)
    assert np.array_equal(np.sort(columns), np.arange(size)), "every column once"
    return {
        "size": size,
        "solver": solver,
        "cpu": round(seconds, 2),
        "matrix_mb": round(cost.nbytes / 1e6),
        "more_mb": round((peak - before) / 1e6),
        "total": total,
        "unchanged_total": float(np.trace(cost, dtype=np.float64)),
        "proven": None if gap is None else gap / abs(total),
    }


def _peak() -> int:
    """The most bytes that this process had in memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def main() -> None:
    """Measure every size and solver, one after the other; print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1536, 4096, 11008, 14336])
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--child", nargs=2, metavar=("SOLVER", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child[0], int(arguments.child[1]), arguments.hidden)))
        return
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        for solver in arguments.solvers:
            if solver == "lapjv" and importlib.util.find_spec("lap") is None:
                continue
            command = [sys.executable, __file__, "--hidden", str(arguments.hidden), "--child", solver, str(size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout))
            print(rows[-1], file=sys.stderr)
        found = [row for row in rows if row["size"] == size]
        least = min(row["total"] for row in found)
        for row in found:
            row["gap"] = (row["total"] - least) / abs(least)
    machine = {"processors": os.cpu_count(), "machine": platform.machine(), "numpy": np.__version__}
    print(json.dumps({"hidden": arguments.hidden, "rows": rows, "machine": machine}, indent=2))


if __name__ == "__main__":
    main()
