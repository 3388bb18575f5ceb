"""The one loop: what is written, what is refused, and what survives a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from unmergeable.checkpoint import partial as partial_module
from unmergeable.checkpoint import rewrite as rewrite_module
from unmergeable.checkpoint import shards
from unmergeable.checkpoint.header import TensorSpec
from unmergeable.checkpoint.manifest import Manifest, check_files, read_manifest, record_file, record_header
from unmergeable.checkpoint.partial import PartialFolder, partial_of
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.rewrite import OutputTensor, output_like, rewrite
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, CheckpointError, DiskError, NotEquivalent, UsageError

WriteFolder = Callable[..., Path]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SMALL_FILES = ("config.json", "model.safetensors.index.json", "tokenizer.json")
EDITED = ("w01.weight", "w03.weight", "v00.weight")


def negate(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.neg_()


def negated(source: TensorSource, out: Path, **settings: Any) -> Manifest:
    """Negate some tensors: exact in every dtype, and its own inverse."""
    edits = dict.fromkeys((name for name in EDITED if name in source.index.entries), negate)
    settings = {"manifest": {"recipe": "negate"}, "resume_token": "negate"} | settings
    return rewrite(source, out, output_like(source, edits), **settings)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def source(two_shards: Path) -> Checkpoint:
    return Checkpoint.open(two_shards)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def frequent_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note in the journal after every tensor or two."""
    monkeypatch.setattr(shards, "_SYNC_BYTES", 4000)


def test_edited_tensors_change_and_the_rest_is_copied(source: Checkpoint, out: Path) -> None:
    negated(source, out)
    for shard in SHARDS:
        before, after = load_file(source.folder / shard), load_file(out / shard)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(after[name], -tensor if name in EDITED else tensor), name
    for name in SMALL_FILES:
        assert (out / name).read_bytes() == (source.folder / name).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted((*SHARDS, *SMALL_FILES, "unmergeable.json"))
    assert not out.with_name("out.partial").exists()


def test_two_negations_give_back_every_byte(source: Checkpoint, out: Path, tmp_path: Path) -> None:
    negated(source, out)
    back = tmp_path / "back"
    negated(Checkpoint.open(out), back)
    for shard in SHARDS:
        assert (back / shard).read_bytes() == (source.folder / shard).read_bytes()
        assert (out / shard).read_bytes() != (source.folder / shard).read_bytes(), "the control"


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("memory_budget", [1, 5000, 1 << 30])
def test_bytes_depend_on_neither_threads_nor_memory(
    threads: int, memory_budget: int, source: Checkpoint, out: Path, tmp_path: Path
) -> None:
    negated(source, out)
    negated(source, tmp_path / "other", threads=threads, memory_budget=memory_budget)
    assert hashes(out) == hashes(tmp_path / "other")


def test_the_manifest(source: Checkpoint, out: Path, tmp_path: Path, single: WriteFolder) -> None:
    base = Checkpoint.open(single(tmp_path / "base", {"w": torch.ones(2)}))
    written = negated(source, out, verify=lambda result: {"measured_error": 0.0}, also_read={"base": base})

    assert read_manifest(out) == written
    assert check_files(out) == ()
    assert dict(written.details) == {"recipe": "negate", "measured_error": 0.0}
    for role, folder in (("source", source.folder), ("base", tmp_path / "base")):
        kept = {path for path in folder.iterdir() if path.name != "pytorch_model.bin"}
        weights = {path for path in kept if path.suffix == ".safetensors"}
        fast = {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in weights}
        assert {file.name: file.xxh3_128 for file in written.inputs[role] if file.xxh3_128} == fast
        small = {path.name: hashes(folder)[path.name] for path in kept - weights}
        assert {file.name: file.sha256 for file in written.inputs[role] if file.sha256} == small
    of_result = hashes(out)
    del of_result["unmergeable.json"]
    assert {file.name: file.sha256 for file in written.outputs} == of_result
    assert [item.name for item in written.left_out] == ["pytorch_model.bin"]
    assert str(tmp_path) not in (out / "unmergeable.json").read_text(), "no paths"


def test_without_checksums_the_files_are_the_same_and_only_headers_are_recorded(
    source: Checkpoint, out: Path, tmp_path: Path
) -> None:
    negated(source, tmp_path / "hashed")
    written = negated(source, out, checksums=False)
    assert {**hashes(out), "unmergeable.json": ""} == {**hashes(tmp_path / "hashed"), "unmergeable.json": ""}
    assert read_manifest(out) == written
    assert check_files(out) == ()
    for folder, records in ((source.folder, written.inputs["source"]), (out, written.outputs)):
        assert {record.name for record in records} == {*SHARDS, *SMALL_FILES}
        for record in records:
            path = folder / record.name
            assert record == (record_header(path) if record.name in SHARDS else record_file(path))


def test_progress_counts_every_byte_once(source: Checkpoint, out: Path) -> None:
    told: list[tuple[str, int, int, str]] = []
    negated(source, out, progress=lambda *report: told.append(report))
    total = sum((out / shard).stat().st_size for shard in SHARDS)
    done = [report[1] for report in told]
    assert done == sorted(done)
    assert told[-1] == ("writing", total, total, "bytes")


def test_tensors_made_added_and_dropped(source: Checkpoint, out: Path) -> None:
    spec = TensorSpec("F32", (2, 2))
    plan = output_like(
        source, {}, drop={"w00.weight"}, extra=[OutputTensor("head.weight", spec, SHARDS[1], fill=torch.nn.init.eye_)]
    )
    rewrite(source, out, plan, manifest={}, resume_token="", config_changes={"tie_word_embeddings": False})
    result = Checkpoint.open(out)
    assert torch.equal(result.tensor("head.weight"), torch.eye(2))
    assert "w00.weight" not in result.names
    assert torch.equal(result.tensor("scale"), source.tensor("scale"))
    assert json.loads((out / "config.json").read_text()) == {"model_type": "toy", "tie_word_embeddings": False}


def test_verification_sees_the_written_files(source: Checkpoint, out: Path) -> None:
    def verify(written: TensorSource) -> Mapping[str, Any]:
        assert not out.exists()
        assert torch.equal(written.tensor("w01.weight"), -source.tensor("w01.weight"))
        return {}

    negated(source, out, verify=verify)
    assert out.exists()


def test_what_fails_verification_is_deleted(source: Checkpoint, out: Path) -> None:
    def verify(written: TensorSource) -> Mapping[str, Any]:
        raise NotEquivalent("logits differ")

    with pytest.raises(NotEquivalent, match="logits differ"):
        negated(source, out, verify=verify)
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


def test_an_interrupt_during_verification_keeps_the_work(source: Checkpoint, out: Path) -> None:
    def interrupt(written: TensorSource) -> Mapping[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        negated(source, out, verify=interrupt)
    assert not out.exists()

    told: list[int] = []
    negated(source, out, progress=lambda stage, done, total, unit: told.append(done) if stage == "writing" else None)
    assert len(told) == 1, "nothing was written a second time"


def test_the_parent_must_exist(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist; create it first"):
        negated(source, tmp_path / "absent" / "out")


def test_out_must_not_exist(source: Checkpoint, out: Path) -> None:
    for create in (lambda: out.mkdir(), lambda: out.touch(), lambda: out.symlink_to("nowhere")):
        create()
        with pytest.raises(BadInput, match="exists: choose another"):
            negated(source, out)
        out.rmdir() if out.is_dir() else out.unlink()


def test_out_and_source_must_lie_apart(source: Checkpoint, tmp_path: Path) -> None:
    inside = source.folder / "out"
    link = tmp_path / "link"
    link.symlink_to(source.folder)
    for target in (inside, link / "out"):
        with pytest.raises(BadInput, match="inside each other"):
            negated(source, target)
    assert sorted(path.name for path in source.folder.iterdir()) == sorted(
        (*SHARDS, "config.json", "model.safetensors.index.json", "pytorch_model.bin", "tokenizer.json")
    )


def test_an_edit_must_keep_shape_and_dtype(source: Checkpoint, out: Path) -> None:
    plan = output_like(source, {"w01.weight": lambda tensor: tensor.float()})
    with pytest.raises(CheckpointError, match=r"'w01\.weight' became F32\[40, 30\]; it must stay BF16\[40, 30\]"):
        rewrite(source, out, plan, manifest={}, resume_token="")
    assert not out.exists()


def test_a_manifest_that_cannot_be_written_is_found_first(source: Checkpoint, out: Path) -> None:
    with pytest.raises(UsageError, match="'recipe'"):
        negated(source, out, manifest={"recipe": object()})
    assert not out.with_name("out.partial").exists()


def test_a_source_that_changes_meanwhile(source: Checkpoint, out: Path) -> None:
    shard = source.folder / SHARDS[1]

    def replace_source(tensor: torch.Tensor) -> torch.Tensor:
        os.utime(shard, ns=(0, 1))
        return tensor

    plan = output_like(source, {"w01.weight": replace_source})
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]} was changed after it was opened"):
        rewrite(source, out, plan, manifest={}, resume_token="")
    assert not out.exists()
    assert not out.with_name("out.partial").exists(), "what was read half before and half after is worth nothing"
    with pytest.raises(CheckpointError, match="was changed after it was opened"):
        negated(source, out)


def test_a_disk_that_is_too_small_is_found_first(
    source: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DiskError, match=r"disk too small: .* free space"):
        negated(source, out)
    assert not out.with_name("out.partial").exists()


@pytest.fixture
def large(tmp_path: Path, single: WriteFolder) -> Checkpoint:
    """3 MB: more than the room that is left in the tests below."""
    return Checkpoint.open(single(tmp_path / "large", {f"w{n:02}.weight": torch.ones(250_000) * n for n in range(3)}))


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """A limit on the size of files, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_on_files_keeps_the_work_and_says_so(
    large: Checkpoint, out: Path, small_files_only: None, frequent_notes: None
) -> None:
    with pytest.raises(DiskError, match=r"disk full while writing model\.safetensors .*it resumes"):
        negated(large, out)
    assert not out.exists()
    assert out.with_name("out.partial").exists()


def test_a_full_disk_then_room(
    large: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frequent_notes: None
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", disk], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("may not mount a tmpfs")
    try:
        with pytest.raises(DiskError, match="disk too small"):
            negated(large, disk / "out")
        monkeypatch.setattr(rewrite_module, "require_space", lambda out, nbytes: None)
        with pytest.raises(DiskError, match="disk full while writing") as caught:
            negated(large, disk / "out")
        assert "\n" not in str(caught.value)
        assert not (disk / "out").exists()

        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        monkeypatch.undo()
        negated(large, disk / "out")
        assert check_files(disk / "out") == ()
        assert not (disk / "out.partial").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


class Stop(Exception):
    """Ends a run from within, as an error of the edit would."""


def stop_at(name: str) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    def stop(tensor: torch.Tensor) -> torch.Tensor:
        raise Stop

    return {**dict.fromkeys(EDITED, negate), name: stop}


def begin(source: Checkpoint, out: Path, *, checksums: bool = True) -> list[str]:
    """Write the first shard and part of the second; return the tensors not yet known to be on the disk."""
    plan = output_like(source, stop_at("v02.weight"))
    with pytest.raises(Stop):
        rewrite(source, out, plan, manifest={}, resume_token="negate", checksums=checksums, threads=1)
    with PartialFolder(out, journal_token(out)) as folder:
        assert set(folder.done.finished) == {SHARDS[0]}
        position = folder.done.begun[SHARDS[1]].position
    return [
        entry.name for entry in source.index.entries.values() if entry.shard == SHARDS[1] and entry.begin >= position
    ]


def journal_token(out: Path) -> str:
    return str(json.loads((out.with_name("out.partial") / "journal").read_text().splitlines()[0])["token"])


def resumed(source: Checkpoint, out: Path, *, checksums: bool = True) -> list[str]:
    """Finish; return the tensors that were edited again."""
    edited: list[str] = []

    def edit(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def work(tensor: torch.Tensor) -> torch.Tensor:
            edited.append(name)
            return negate(tensor) if name in EDITED else tensor

        return work

    edits = {name: edit(name) for name in (*EDITED, "v02.weight")}
    plan = output_like(source, edits)
    manifest = {"recipe": "negate"}
    rewrite(source, out, plan, manifest=manifest, resume_token="negate", checksums=checksums, threads=1)
    return edited


@pytest.fixture
def whole(source: Checkpoint, tmp_path: Path) -> dict[str, str]:
    negated(source, tmp_path / "whole")
    return hashes(tmp_path / "whole")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("then", [True, False])
def test_work_is_resumed_inside_a_shard_with_checksums_and_without(
    first: bool, then: bool, source: Checkpoint, out: Path, tmp_path: Path, frequent_notes: None
) -> None:
    """Also when only one of the two runs was asked for checksums: the result is that of the last."""
    missing = begin(source, out, checksums=first)
    assert missing == ["v02.weight", "v03.weight"]
    assert resumed(source, out, checksums=then) == ["v02.weight"]
    negated(source, tmp_path / "whole", checksums=then)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_without_checksums_a_file_that_lost_its_end_is_written_again(
    source: Checkpoint, out: Path, whole: dict[str, str], frequent_notes: None
) -> None:
    begin(source, out, checksums=False)
    for shard in SHARDS:
        os.truncate(out.with_name("out.partial") / "checkpoint" / shard, 2000)
    assert resumed(source, out, checksums=False) == ["w01.weight", "w03.weight", "v00.weight", "v02.weight"]
    assert {**hashes(out), "unmergeable.json": whole["unmergeable.json"]} == whole


def test_damage_to_what_is_there_is_noticed(
    source: Checkpoint, out: Path, whole: dict[str, str], frequent_notes: None
) -> None:
    """Of either shard one bit flips: both are written again, and nothing wrong is vouched for."""
    begin(source, out)
    for shard in SHARDS:
        path = out.with_name("out.partial") / "checkpoint" / shard
        data = bytearray(path.read_bytes())
        data[2000] ^= 1
        path.write_bytes(data)
    assert resumed(source, out) == ["w01.weight", "w03.weight", "v00.weight", "v02.weight"]
    assert hashes(out) == whole


@pytest.mark.parametrize("change", ["token", "source", "plan"])
def test_other_work_starts_afresh(change: str, source: Checkpoint, out: Path, frequent_notes: None) -> None:
    begin(source, out)
    if change == "source":
        os.utime(source.folder / SHARDS[0], ns=(0, 1))
        source = Checkpoint.open(source.folder)
    edits = stop_at("v02.weight") if change != "plan" else {"w00.weight": negate} | stop_at("v02.weight")
    token = "other" if change == "token" else "negate"
    edited: list[torch.Tensor] = []
    edits["w01.weight"] = lambda tensor: edited.append(tensor) or tensor  # type: ignore[func-returns-value]
    with pytest.raises(Stop):
        rewrite(source, out, output_like(source, edits), manifest={}, resume_token=token, threads=1)
    assert len(edited) == 1


def test_side_files_of_an_earlier_run_do_not_survive(
    source: Checkpoint, out: Path, whole: dict[str, str], frequent_notes: None
) -> None:
    (source.folder / "vocab.txt").touch()
    begin(Checkpoint.open(source.folder), out)
    (source.folder / "vocab.txt").unlink()
    resumed(Checkpoint.open(source.folder), out)
    assert hashes(out) == whole


# Runs in a process of its own, which forks a child for every run. A child with a fuse kills itself with SIGKILL before
# the call of that number that changes the disk.
PRELUDE = """
import itertools, os, shutil, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
from unmergeable.checkpoint import disk, rewrite as module, writer
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import BadInput

torch.set_num_threads(1)
module._SYNC_BYTES = 4000
source, out, whole = map(Path, sys.argv[1:4])
checksums, fills = sys.argv[4] == "checksums", sys.argv[5] == "fill"
step = int(sys.argv[6])
edited = sys.argv[7:]
if fills:
    disk.BLOCK_BYTES = writer.BLOCK_BYTES = disk.ALIGNMENT  # write from the memory in which the tensors are made

def count_calls(owner, name, counter, fuse):
    real = getattr(owner, name)
    def call(*arguments, **keywords):
        if next(counter) == fuse:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    setattr(owner, name, call)

def negative(checkpoint, name):
    return lambda out: torch.neg(checkpoint.tensor(name), out=out)

def negated(fuse):
    counter = itertools.count()
    for name in "open write pwrite fsync ftruncate mkdir rename replace link unlink rmdir".split():
        count_calls(os, name, counter, fuse)
    count_calls(disk, "_datasync", counter, fuse)
    checkpoint = Checkpoint.open(source)
    plan = module.output_like(checkpoint, dict.fromkeys(edited, torch.Tensor.neg_))
    if fills:
        plan = [replace(t, edit=None, fill=negative(checkpoint, t.name)) if t.edit else t for t in plan]
    settings = {"manifest": {"recipe": "negate"}, "resume_token": "negate", "checksums": checksums, "threads": 1}
    module.rewrite(checkpoint, out, plan, **settings)

def is_killed(fuse):
    child = os.fork()
    if child == 0:
        negated(fuse)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if out.exists() and contents(out) != contents(whole):
        sys.exit(f"fuse {fuse}: OUT is not what it must be")
    if status != 0 and not os.WIFSIGNALED(status):
        sys.exit(f"fuse {fuse}: the run failed")
    return status != 0

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
"""
EACH_CALL = """
partial = out.with_name("out.partial")
beside = {path.name for path in out.parent.iterdir()} | {out.name}

def is_empty(folder):
    return not (folder.exists() and any(folder.iterdir()))

def fails_because_out_exists():
    # Killed before its last call, or after it: nothing says any more which work this was.
    try:
        negated(-1)
    except BadInput as error:
        assert "exists" in str(error), error
    else:
        sys.exit("OUT was not refused")

for fuse in range(0, 200, step):
    if not is_killed(fuse):
        break
    if not (out.exists() and is_empty(partial)) and is_killed(-1):
        sys.exit(f"fuse {fuse}: the next run was killed as well")
    if out.exists() and is_empty(partial):
        fails_because_out_exists()
    if partial.exists() or {path.name for path in out.parent.iterdir()} != beside:
        sys.exit(f"fuse {fuse}: something was left behind")
    shutil.rmtree(out)
print(fuse)
"""
AGAIN_AND_AGAIN = """
killed = 0
while not out.exists():
    killed += is_killed(20 + 5 * killed)
print(killed)
"""


def interrupted_after_the_rename(source: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """What a kill leaves that comes between the rename of a result and the removal of its journal."""
    with monkeypatch.context() as patch:
        patch.setattr(partial_module, "_remove_partial", lambda folder: None)
        return negated(source, out)


def test_a_result_that_was_in_place_when_the_run_was_killed(
    source: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = interrupted_after_the_rename(source, out, monkeypatch)
    whole, verified = hashes(out), []

    def verify(result: TensorSource) -> dict[str, Any]:
        verified.append(result.folder)
        return {}

    assert negated(source, out, verify=verify) == written
    assert hashes(out) == whole
    assert verified == [out], "what an earlier run wrote is verified like any other"
    assert not partial_of(out).exists()
    with pytest.raises(BadInput, match="exists"):  # the control: without leftovers OUT is simply there
        negated(source, out)


@pytest.mark.parametrize("change", ["token", "source", "plan"])
def test_a_result_of_other_work_is_refused_although_leftovers_lie_beside_it(
    change: str, source: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_after_the_rename(source, out, monkeypatch)
    if change == "source":
        os.utime(source.folder / SHARDS[0], ns=(0, 1))
        source = Checkpoint.open(source.folder)
    plan = output_like(source, {} if change == "plan" else dict.fromkeys(EDITED, negate))
    with pytest.raises(BadInput, match="exists"):
        rewrite(source, out, plan, manifest={}, resume_token="other" if change == "token" else "negate")
    assert check_files(out) == ()


@pytest.fixture
def larger(sharded: WriteFolder, tensors: Callable[..., dict[str, torch.Tensor]], tmp_path: Path) -> Checkpoint:
    """Tensors of several pages, which are written from where they are made."""
    shards = {shard: tensors(4, (80, 60), prefix) for shard, prefix in zip(SHARDS, "wv", strict=True)}
    return Checkpoint.open(sharded(tmp_path / "larger", shards))


MODES = [("checksums", "edit"), ("plain", "edit"), ("plain", "fill")]
# The modes differ in what happens between the first byte of a shard and its last: a few calls show it.
SOME_MODES = [pytest.param(mode, marks=() if mode == MODES[0] else pytest.mark.slow) for mode in MODES]
SOME_STEPS = [
    *((mode, 3 if mode == MODES[0] else 8) for mode in MODES),
    *(pytest.param(mode, 1, marks=pytest.mark.slow) for mode in MODES),
]


def kill(script: str, source: Checkpoint, out: Path, mode: tuple[str, str], step: int = 1) -> int:
    """How many runs were killed; each that was not left what an undisturbed run leaves."""
    whole = out.with_name("whole")
    negated(source, whole, checksums=mode[0] == "checksums")
    command = [
        sys.executable,
        "-c",
        PRELUDE + script,
        *map(str, (source.folder, out, whole)),
        *mode,
        str(step),
        *EDITED,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.parametrize(("mode", "step"), SOME_STEPS)
def test_killed_before_a_call_that_changes_the_disk_then_run_again(
    mode: tuple[str, str], step: int, larger: Checkpoint, out: Path
) -> None:
    """Every ``step``-th call from the first to the last."""
    assert kill(EACH_CALL, larger, out, mode, step) >= 50, "too few calls: the test would show little"


@pytest.mark.parametrize("mode", SOME_MODES, ids=" ".join)
def test_killed_again_and_again_the_work_still_ends(mode: tuple[str, str], larger: Checkpoint, out: Path) -> None:
    """Each run resumes what the one before left, and is killed a little later."""
    assert kill(AGAIN_AND_AGAIN, larger, out, mode) >= 3
    assert hashes(out) == hashes(out.with_name("whole"))
