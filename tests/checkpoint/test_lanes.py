"""Several shards written at a time: the bytes of one after another, and nothing left half done."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unmergeable.checkpoint import lanes, shards
from unmergeable.checkpoint.manifest import check_files
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.rewrite import output_like, rewrite

WriteFolder = Callable[..., Path]
SHARDS = tuple(f"model-0000{number}-of-00005.safetensors" for number in range(1, 6))


@pytest.fixture
def source(tmp_path: Path, sharded: WriteFolder, tensors: Callable[..., dict[str, torch.Tensor]]) -> Checkpoint:
    return Checkpoint.open(
        sharded(tmp_path / "source", {name: tensors(3 + at, prefix="abcde"[at]) for at, name in enumerate(SHARDS)})
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def negate(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.neg_()


def negated(source: Checkpoint, out: Path, *, threads: int, **edits: Callable[[torch.Tensor], torch.Tensor]) -> None:
    every = {name: edits.get(name[0], negate) for name in source.names}
    rewrite(source, out, output_like(source, every), manifest={"recipe": 1}, resume_token="t", threads=threads)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The thread of every call that writes shards, and which it wrote."""
    calls: list[tuple[str, list[str]]] = []

    def noted(files: Path, starts: list[shards.Start], *rest: object, **settings: object) -> object:
        calls.append((threading.current_thread().name, [start.shard.name for start in starts]))
        return shards.write_shards(files, starts, *rest, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(lanes, "write_shards", noted)
    return calls


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_the_result_is_that_of_one_lane(
    threads: int, source: Checkpoint, out: Path, tmp_path: Path, used: list[tuple[str, list[str]]]
) -> None:
    negated(source, tmp_path / "one", threads=1)
    assert [written for _, written in used] == [list(SHARDS)], "the control: one call writes all"
    used.clear()

    negated(source, out, threads=threads)

    assert hashes(out) == hashes(tmp_path / "one"), "the manifest is one of these"
    assert check_files(out) == ()
    assert len({thread for thread, _ in used}) == min(threads, lanes.MOST_LANES)
    assert sorted(name for _, written in used for name in written) == sorted(SHARDS)


def test_a_failure_in_one_lane_ends_all_and_the_next_run_goes_on(
    source: Checkpoint, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other lane is held until the first has failed, and then stops before its next piece."""
    monkeypatch.setattr(shards, "_SYNC_BYTES", 1000)
    failed = threading.Event()

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        failed.set()
        raise ValueError("of an edit")

    def held(tensor: torch.Tensor) -> torch.Tensor:
        assert failed.wait(10)
        return negate(tensor)

    with pytest.raises(ValueError, match="of an edit"):
        negated(source, out, threads=2, a=fail, b=held)
    assert not out.exists()

    negated(source, tmp_path / "whole", threads=1)
    negated(source, out, threads=2)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not out.with_name("out.partial").exists()


def test_what_was_finished_is_kept(source: Checkpoint, out: Path) -> None:
    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise ValueError("of an edit")

    with pytest.raises(ValueError, match="of an edit"):
        negated(source, out, threads=1, e=fail)
    edited: list[torch.Tensor] = []

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        edited.append(tensor)
        return negate(tensor)

    negated(source, out, threads=2, a=counted, b=counted, c=counted)
    assert edited == [], "the first three shards are there"
    assert check_files(out) == ()


def test_progress_grows_and_ends_at_all_bytes(source: Checkpoint, out: Path) -> None:
    told: list[tuple[int, int]] = []
    plan = output_like(source, dict.fromkeys(source.names, negate))

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        if stage == "writing":
            told.append((done, total))

    rewrite(source, out, plan, manifest={}, resume_token="t", threads=4, progress=progress)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (sum((out / name).stat().st_size for name in SHARDS),) * 2


def test_an_interrupt_ends_every_lane(source: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's thread only waits, and Control-C reaches it there."""
    before = threading.active_count()
    monkeypatch.setattr(shards, "_SYNC_BYTES", 1000)
    waits = lanes.wait
    calls = []

    def interrupted(*arguments: object, **settings: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return waits(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(lanes, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        negated(source, out, threads=2)
    assert threading.active_count() == before
    assert not out.exists()
    monkeypatch.setattr(lanes, "wait", waits)
    negated(source, out, threads=2)
    assert check_files(out) == ()
