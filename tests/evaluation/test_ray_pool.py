"""The same work in actors of a Ray cluster of this machine: the same results, and begun again when an actor dies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.timeless import timeless
from unmergeable.errors import BadInput, UnmergeableError, UsageError
from unmergeable.evaluation.audits import audit
from unmergeable.pools.pool import ATTEMPTS, Call
from unmergeable.pools.ray_pool import LOCAL, RayPool

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("default")  # Ray leaves sockets and files for the interpreter to close


@pytest.mark.slow
def test_an_audit_gives_what_it_gives_without(plan_file: Path, document: dict[str, Any], tmp_path: Path) -> None:
    """First: there is one cluster at a time."""
    document["coefficients"] = {"defended": [0.65, 1.0], "rider": [1.0], "refinements": 2}
    document["tiers"] = ["T0"]
    plan_file.write_text(yaml.safe_dump(document))
    there = audit(plan_file, out=tmp_path / "ray", workers=1, ray=LOCAL)
    here = audit(plan_file, out=tmp_path / "here", workers=1)
    assert timeless(there) == timeless(here)
    cells = [sorted(path.name for path in (tmp_path / name / "cells").iterdir()) for name in ("ray", "here")]
    assert cells[0] == cells[1]


def test_where_there_is_no_cluster() -> None:
    with pytest.raises(UsageError, match="no cluster to work with"):
        RayPool("127.0.0.1:1")


@pytest.fixture(scope="module")
def pool() -> Iterator[RayPool]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see the tests
    with RayPool(LOCAL, 2) as pool:
        yield pool


def fail() -> None:
    raise BadInput("the work itself is wrong.")


def die(path: Path, times: int) -> str:
    """Kill the process, as running out of memory does, the first few times."""
    count = len(list(path.iterdir()))
    if count < times:
        (path / str(count)).touch()
        os._exit(9)
    return "done"


@pytest.mark.slow
def test_actors_stay_from_batch_to_batch(pool: RayPool) -> None:
    first, second = (set(dict(pool.run([(os.getpid, ()) for _ in range(8)])).values()) for _ in range(2))
    assert first == second
    assert os.getpid() not in first
    assert len(first) == 2


@pytest.mark.slow
def test_every_call_is_answered(pool: RayPool) -> None:
    calls: list[Call] = [(abs, (-number,)) for number in range(5)]
    assert dict(pool.run(calls)) == dict(enumerate(range(5)))


@pytest.mark.slow
def test_an_error_of_the_work_passes_through(pool: RayPool) -> None:
    with pytest.raises(BadInput, match=r"^the work itself is wrong\.$"):
        dict(pool.run([(fail, ())]))


@pytest.mark.slow
def test_a_death_is_survived(pool: RayPool, tmp_path: Path) -> None:
    calls: list[Call] = [(die, (tmp_path, ATTEMPTS - 1)), (abs, (-9,))]
    assert dict(pool.run(calls)) == {0: "done", 1: 9}


@pytest.mark.slow
def test_work_that_always_kills_is_given_up(pool: RayPool, tmp_path: Path) -> None:
    with pytest.raises(UnmergeableError, match="a worker died 3 times"):
        dict(pool.run([(die, (tmp_path, 99))]))
    assert len(list(tmp_path.iterdir())) == ATTEMPTS
