"""``protect`` on a Ray cluster of this machine: the same bytes though workers are killed, and what its files show."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import unmergeable
from contracts.test_secrets import holds
from unmergeable.checkpoint.manifest import check_files
from unmergeable.gauge.key import read_key
from unmergeable.ops import protection
from unmergeable.pools.pool import Call
from unmergeable.pools.ray_pool import LOCAL, RayPool
from zoo import TOYS, random_network

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # Ray leaves sockets and files for the interpreter to close
]


ADDRESS = os.environ.get("UNMERGEABLE_TEST_RAY", LOCAL)
"""A cluster of this machine that runs already, for machines too busy to start one in the time that Ray gives it."""


class Watched(RayPool):
    """Kills the actors that write when the first shard is there, and looks at what the cluster wrote and is called."""

    killed: set[int]
    seen: dict[str, bytes]

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        writes = calls[0][0].__name__ == "write_share"
        workers = {pid for _, pid in super().run([(os.getpid, ())] * 8)} if writes else set()
        for number, result in super().run(calls):
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            if workers:
                type(self).killed, workers = workers, set()
            yield number, result
        session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
        for path in (*session.rglob("*"), *Path("/proc").glob("[0-9]*/cmdline")):
            if path.is_file():
                type(self).seen[str(path)] = path.read_bytes()


@pytest.mark.parametrize("method", ["params,gauge"])
def test_a_release_is_that_of_one_process_though_workers_are_killed(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Watched.killed, Watched.seen = set(), {}
    for seed, role in enumerate(("base", "expert")):
        random_network(TOYS["llama"], seed).to(torch.bfloat16).save_pretrained(tmp_path / role, max_shard_size="40KB")
    monkeypatch.setattr(protection, "RayPool", Watched)
    contents = []
    for out, options in {"here": {}, "there": {"ray": ADDRESS, "workers": 2}}.items():
        given = {"base": tmp_path / "base", "method": method, "settings": {"gauge.quantisation": "free"}, "seed": 3}
        unmergeable.protect(tmp_path / "expert", out=tmp_path / out, key=tmp_path / f"{out}.key", **given, **options)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()})
    assert contents[0] == contents[1]
    assert len(Watched.killed) == 2, "control: they were killed"
    assert check_files(tmp_path / "there") == ()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "expert", "here", "here.key", "there", "there.key"}

    key = read_key(tmp_path / "there.key")
    assert any("logs" in path for path in Watched.seen), "control: the logs were read"
    assert any(b"raylet" in line for path, line in Watched.seen.items() if path.startswith("/proc")), "control"
    told = [path for path, content in Watched.seen.items() if holds(content, key.entropy)]
    told += [path for path, content in Watched.seen.items() if holds(content, key.stream().key)]
    assert told == []
