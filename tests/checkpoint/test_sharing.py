"""Shards written by several processes: the bytes of one, and what is begun again when one is killed in the middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from unmergeable.checkpoint import sharing
from unmergeable.checkpoint.manifest import Manifest, check_files
from unmergeable.checkpoint.partial import PartialFolder
from unmergeable.checkpoint.pipeline import InputHashes
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.rewrite import output_like, rewrite
from unmergeable.checkpoint.sharing import Planned, SharedPlan
from unmergeable.errors import DiskError, UnmergeableError
from unmergeable.pools.pool import ATTEMPTS, Call, WorkerPool

SHARDS, TENSORS = 4, 6


@pytest.fixture
def folder(tmp_path: Path, sharded: Callable[..., Path]) -> Path:
    """Four shards of six matrices."""
    shards = {
        f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors": {
            f"{shard}.{number}": torch.full((64, 64), shard + number / 8) for number in range(TENSORS)
        }
        for shard in range(SHARDS)
    }
    return sharded(tmp_path / "source", shards)


def negated(folder: Path, deaths: Path | None = None, times: int = 0, at: str = "2.3") -> Planned:
    """Everything times minus one; the process is killed when it comes to a tensor, the first few times."""
    source = Checkpoint.open(folder)

    def edit(name: str) -> Any:
        def negate(tensor: torch.Tensor) -> torch.Tensor:
            if deaths is not None and name == at and len(list(deaths.iterdir())) < times:
                (deaths / str(os.getpid())).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return tensor.neg_()

        return negate

    return Planned(source, output_like(source, {name: edit(name) for name in source.names}))


def write(folder: Path, out: Path, shared: SharedPlan | None = None, **settings: Any) -> Manifest:
    planned = negated(folder)
    given = {"manifest": {"recipe": "negate"}, "resume_token": "negate", **settings}
    return rewrite(planned.source, out, planned.tensors, shared=shared, **given)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("checksums", [True, False])
def test_the_bytes_are_those_of_one_process(checksums: bool, folder: Path, tmp_path: Path) -> None:
    shared = SharedPlan(WorkerPool(1), negated, (folder,))
    assert write(folder, tmp_path / "there", shared, checksums=checksums) == write(
        folder, tmp_path / "here", checksums=checksums
    )
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_process_killed_in_the_middle_of_a_shard(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "here")
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    with WorkerPool(2) as pool:
        write(folder, tmp_path / "there", SharedPlan(pool, negated, (folder, deaths, ATTEMPTS - 1)))
    assert len(list(deaths.iterdir())) == ATTEMPTS - 1, "control: they were killed"
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert not (tmp_path / "there.partial").exists()


def test_a_shard_that_kills_whoever_writes_it(folder: Path, tmp_path: Path) -> None:
    """Given up; what the others wrote is kept, and the work goes on from there."""
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    with WorkerPool(2) as pool, pytest.raises(UnmergeableError, match="a worker died 3 times"):
        write(folder, tmp_path / "there", SharedPlan(pool, negated, (folder, deaths, ATTEMPTS)))
    assert not (tmp_path / "there").exists()
    written = (tmp_path / "there.partial/checkpoint").glob("*.safetensors")
    kept = {path.name: path.stat().st_mtime_ns for path in written}
    # Two begin at a time, so that one of the first is done before the third is begun; the other may die with it.
    assert kept.keys() & {"model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"}
    assert "model-00003-of-00004.safetensors" not in kept
    write(folder, tmp_path / "there", SharedPlan(WorkerPool(1), negated, (folder,)))
    assert {name: (tmp_path / "there" / name).stat().st_mtime_ns for name in kept} == kept
    assert check_files(tmp_path / "there") == ()


class Twice:
    """Does every share a second time after its result was taken, as one does that was given up for dead and is not."""

    def __enter__(self) -> Twice:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        for number, (function, arguments) in enumerate(calls):
            yield number, function(*arguments)
            function(*arguments)


def test_a_process_given_up_that_lives_on(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path / "there", SharedPlan(Twice(), negated, (folder,)))
    write(folder, tmp_path / "here")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "there", "here"}


def test_a_full_disk_elsewhere_keeps_what_is_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *exception: object) -> None: ...

        def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
            for number, (function, arguments) in enumerate(calls[:2]):
                yield number, function(*arguments)
            raise DiskError("disk full while writing")

    with pytest.raises(DiskError):
        write(folder, tmp_path / "there", SharedPlan(Full(), negated, (folder,)))
    assert not (tmp_path / "there").exists()
    assert len(list((tmp_path / "there.partial/checkpoint").glob("*.safetensors"))) == 2
    began: list[str | None] = []
    monkeypatch.setattr(
        sharing, "_own_folder", lambda place, real=sharing._own_folder: (began.append(place.name), real(place))[1]
    )
    write(folder, tmp_path / "there", SharedPlan(WorkerPool(1), negated, (folder,)))
    assert began == ["2", "3"], "shares that were done are only checked"


def test_every_input_is_hashed_once(folder: Path, tmp_path: Path) -> None:
    """By the first shard that reads it, or by itself where none does; noted for a run that resumes."""
    source = Checkpoint.open(folder)
    layout = negated(folder).lay_out()
    dealt = list(sharing._dealt(layout.shards[1:], list(source.index.tensor_files)))
    assert [None if shard is None else shard.name for shard, _ in dealt][-1] is None
    assert sorted(path for _, inputs in dealt for path in inputs) == sorted(source.index.tensor_files)
    with PartialFolder(tmp_path / "out", "token") as partial:
        hashes = InputHashes(source.index.tensor_files, {})
        sharing.write_elsewhere(
            partial,
            layout,
            {"source": source},
            hashes,
            SharedPlan(WorkerPool(1), negated, (folder,)),
            sharing.Means(True, None, 1 << 20),
            lambda *told: None,
        )
        expected = InputHashes(source.index.tensor_files, {})
        expected.finish_all()
        assert hashes.records == expected.records
    with PartialFolder(tmp_path / "out", "token") as again:
        assert {Path(path): record for path, record in again.done.inputs.items()} == expected.records
