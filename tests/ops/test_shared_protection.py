"""``protect`` shared among processes: the same bytes as from one, and no more of the secret told than is needed."""

from __future__ import annotations

import json
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmergeable
from contracts.test_secrets import holds
from unmergeable.checkpoint.manifest import check_files
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.cli import main
from unmergeable.errors import BadInput, NotEquivalent, UnmergeableError, UsageError
from unmergeable.gauge.key import read_key
from unmergeable.ops import protect_inputs, protection
from unmergeable.ops.steps import steps_of
from unmergeable.pools.pool import Call, WorkerPool
from unmergeable.protections import PROTECTIONS
from zoo import TOYS, random_network

SHARD = "40KB"


def write_sharded(name: str, folder: Path, seed: int) -> Path:
    """A toy in several files."""
    random_network(TOYS[name], seed).to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def processes() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


class Lent:
    """What stands for a cluster: a pool that stays when a run has ended, and keeps note of what it was given."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self.calls: list[Call] = []

    def __enter__(self) -> Lent:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        self.calls += calls
        return self.pool.run(calls)


class OneAfterAnother(Lent):
    """Everything in this process; stops after some calls of :func:`~unmergeable.checkpoint.sharing.write_share`."""

    def __init__(self, shares: int | None = None) -> None:
        super().__init__(WorkerPool(1))
        self.shares = shares

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        for number, result in super().run(calls):
            yield number, result
            if calls[0][0].__name__ == "write_share" and self.shares is not None and number + 1 == self.shares:
                raise KeyboardInterrupt


@pytest.fixture
def lend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    def lend(pool: Any) -> Any:
        monkeypatch.setattr(protection, "RayPool", lambda address, workers, *, uses_gpus: pool)
        return pool

    return lend


def protect(folder: Path, out: str, **options: Any) -> Path:
    given = {"base": folder / "base", "out": folder / out, "key": folder / f"{out}.key", "seed": 3, **options}
    unmergeable.protect(folder / "expert", **given)
    return folder / out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FREE = {"quantisation": "free"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "the default": ("llama", {}),
    "rotations": ("llama", {"method": "gauge", "settings": FREE}),
    "orders in the key": ("llama", {"method": "params", "settings": FREE}),
    "inside heads": ("gpt2", {"method": "mergelock", "settings": FREE}),
    "three at once": ("llama", {"method": "params,mergelock,gauge"}),
    "experts change files": ("mixtral", {"method": "gauge", "settings": FREE}),
    "a tied head stored apart": ("gemma", {"method": "gauge", "settings": FREE | {"untie": True}}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_that_of_one_process(
    case: str, tmp_path: Path, processes: WorkerPool, lend: Callable[[Any], Any]
) -> None:
    name, options = CASES[case]
    for seed, role in enumerate(("base", "expert")):
        write_sharded(name, tmp_path / role, seed)
    here = contents(protect(tmp_path, "here", **options))
    lent = lend(Lent(processes))
    assert contents(protect(tmp_path, "there", ray="an address", **options)) == here
    assert {call[0].__name__ for call in lent.calls} == {
        "_require_finite_elsewhere",
        "write_share",
        "_errors_elsewhere",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base",
        "expert",
        "here",
        "here.key",
        "there",
        "there.key",
    ]
    assert contents(protect(tmp_path, "other", **options | {"seed": 4})) != here, "control"


def test_an_adapter_is_merged_on_the_way(tmp_path: Path, processes: WorkerPool, lend: Callable[[Any], Any]) -> None:
    base = write_sharded("llama", tmp_path / "base", 0)
    layer = "model.layers.0.mlp.up_proj"
    rows, columns = Checkpoint.open(base).spec(f"{layer}.weight").shape
    generator = torch.Generator().manual_seed(9)
    factors = {"A": torch.randn(2, columns, generator=generator), "B": torch.randn(rows, 2, generator=generator)}
    (tmp_path / "expert").mkdir()
    named = {f"base_model.model.{layer}.lora_{name}.weight": factor for name, factor in factors.items()}
    save_file(named, tmp_path / "expert" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (tmp_path / "expert" / "adapter_config.json").write_text(json.dumps(config))
    here = contents(protect(tmp_path, "here"))
    lend(Lent(processes))
    assert contents(protect(tmp_path, "there", ray="an address")) == here


@pytest.fixture
def llamas(tmp_path: Path) -> Path:
    for seed, role in enumerate(("base", "expert")):
        write_sharded("llama", tmp_path / role, seed)
    return tmp_path


@pytest.mark.parametrize("is_shared_again", [True, False])
def test_an_interrupted_run_goes_on(is_shared_again: bool, llamas: Path, lend: Callable[[Any], Any]) -> None:
    """Among processes or in this one alone: the journal is the same."""
    whole = contents(protect(llamas, "whole"))
    shards = len([name for name in whole if name.endswith(".safetensors")])
    lend(OneAfterAnother(2))
    with pytest.raises(KeyboardInterrupt):
        protect(llamas, "out", ray="an address")
    assert not (llamas / "out").exists()
    finished = llamas / "out.partial" / "checkpoint"
    written = {path: path.stat().st_mtime_ns for path in finished.glob("*.safetensors")}
    assert len(written) == 2 < shards
    abandoned = llamas / "out.partial" / "shares" / "3-lost"
    abandoned.mkdir()
    (abandoned / "model.safetensors").write_bytes(b"half")

    again = lend(OneAfterAnother())
    if is_shared_again:
        with pytest.MonkeyPatch.context() as patch:
            moved: list[str] = []
            replace = Path.replace
            patch.setattr(Path, "replace", lambda self, to: (moved.append(to.name), replace(self, to))[1])
            protect(llamas, "out", ray="an address")
        assert len([name for name in moved if name.endswith(".safetensors")]) == shards - 2
        assert any(call[0].__name__ == "write_share" for call in again.calls)
    else:
        protect(llamas, "out")
        assert again.calls == []
    assert contents(llamas / "out") == whole
    assert {path.name: time for path, time in written.items()} == {
        path.name: (llamas / "out" / path.name).stat().st_mtime_ns for path in written
    }
    assert not (llamas / "out.partial").exists()


def test_a_shard_that_changed_meanwhile_is_written_again(llamas: Path, lend: Callable[[Any], Any]) -> None:
    whole = contents(protect(llamas, "whole"))
    lend(OneAfterAnother(2))
    with pytest.raises(KeyboardInterrupt):
        protect(llamas, "out", ray="an address")
    first = min((llamas / "out.partial" / "checkpoint").glob("*.safetensors"))
    with first.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    lend(OneAfterAnother())
    protect(llamas, "out", ray="an address")
    assert contents(llamas / "out") == whole
    assert check_files(llamas / "out") == ()


def test_out_is_there_when_it_is_whole_and_not_before(llamas: Path, lend: Callable[[Any], Any]) -> None:
    class Watched(OneAfterAnother):
        def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
            for number, result in super().run(calls):
                assert not (llamas / "out").exists()
                yield number, result

    lend(Watched())
    out = protect(llamas, "out", ray="an address")
    assert check_files(out) == ()


def test_what_does_not_compute_the_same_is_found_and_removed(llamas: Path, lend: Callable[[Any], Any]) -> None:
    class Spoiling(OneAfterAnother):
        def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
            if calls[0][0].__name__ == "_errors_elsewhere":
                name = Checkpoint.open(llamas / "expert").index.entries["model.layers.1.mlp.down_proj.weight"].shard
                written = llamas / "out.partial" / "checkpoint" / name
                spoiled = {key: tensor * 1.5 for key, tensor in load_file(written).items()}
                written.unlink()
                save_file(spoiled, written, {"format": "pt"})
            return super().run(calls)

    lend(Spoiling())
    with pytest.raises(NotEquivalent, match="nothing was written"):
        protect(llamas, "out", ray="an address")
    assert sorted(path.name for path in llamas.iterdir()) == ["base", "expert"]


def test_a_nan_is_found_elsewhere_too(llamas: Path, lend: Callable[[Any], Any]) -> None:
    shard = max((llamas / "expert").glob("*.safetensors"))
    broken = load_file(shard)
    name = next(iter(broken))
    broken[name].view(-1)[0] = float("nan")
    shard.unlink()
    save_file(broken, shard, {"format": "pt"})
    lend(OneAfterAnother())
    with pytest.raises(BadInput, match="NaN") as caught:
        protect(llamas, "out", ray="an address")
    assert name in str(caught.value)
    assert sorted(path.name for path in llamas.iterdir()) == ["base", "expert"]


@pytest.mark.parametrize("method", ["gauge", "params"])
def test_other_processes_get_what_gauges_are_drawn_from_and_not_the_key(
    method: str, llamas: Path, lend: Callable[[Any], Any]
) -> None:
    lent = lend(OneAfterAnother())
    options = {"method": method, "settings": FREE, "seed": None, "passphrase": "correct horse"}
    protect(llamas, "out", ray="an address", **options)
    key = read_key(llamas / "out.key", "correct horse")
    shares = [call for call in lent.calls if call[0].__name__ == "write_share"]
    others = [call for call in lent.calls if call[0].__name__ != "write_share"]
    arguments = [pickle.dumps(argument) for _, given in shares for argument in given]
    assert [argument for argument in arguments if holds(argument, key.entropy)] == []
    stream = [argument for argument in arguments if holds(argument, key.stream().key)]
    assert len(stream) == len(shares), "control: it is seen where it is"
    assert max(map(len, stream)) < 1000, "a call of its own holds it, whatever else is large"
    whole = pickle.dumps(others) + repr(lent.calls).encode()
    assert not holds(whole, key.stream().key)
    assert not holds(whole, key.entropy)
    assert b"correct horse" not in pickle.dumps(lent.calls)


def test_processes_that_see_other_files_or_run_other_versions_are_refused(
    llamas: Path, lend: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def saying(share: Any, **changes: str) -> Any:
        return replace(share, **changes)

    class Elsewhere(OneAfterAnother):
        changes: dict[str, str]

        def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
            changed = [
                (function, (saying(given[0], **self.changes), *given[1:]))
                if function.__name__ == "write_share"
                else (function, given)
                for function, given in calls
            ]
            return super().run(changed)

    pool = lend(Elsewhere())
    pool.changes = {"described": "other headers"}
    with pytest.raises(BadInput, match="sees other files than this machine"):
        protect(llamas, "out", ray="an address")
    pool.changes = {"software": "unmergeable 99"}
    with pytest.raises(UnmergeableError, match="this machine unmergeable 99"):
        protect(llamas, "out", ray="an address")
    pool.changes = {}
    protect(llamas, "out", ray="an address")


def test_a_machine_without_the_files_is_named(llamas: Path) -> None:
    reopen = protect_inputs._Reopen(llamas / "elsewhere", llamas / "base", None, run="")
    with pytest.raises(BadInput, match=f"{socket.gethostname()} does not see what this machine sees: .*elsewhere"):
        reopen()


SHAREABLE = {"gauge", "mergelock", "params"}


def test_which_methods_can_be_shared() -> None:
    assert {name for name in PROTECTIONS if steps_of(name, {})[0].protection.is_shareable} == SHAREABLE


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "mergebarrier", "--set", "parts=attention"],
        ["--method", "sensitivity_shield,gauge", "--sibling", "expert"],
        ["--method", "collapse", "--data", "base"],
        ["--keep-adapter"],
    ],
)
def test_others_are_refused_in_one_line(arguments: list[str], llamas: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["protect", str(llamas / "expert"), "--base", str(llamas / "base"), "--out", str(llamas / "out")]
    assert main([*command, *arguments, "--ray", "local"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "works on one machine" in line
    assert sorted(path.name for path in llamas.iterdir()) == ["base", "expert"]


def test_workers_are_those_of_a_cluster(llamas: Path) -> None:
    with pytest.raises(UsageError, match="give ray as well"):
        protect(llamas, "out", workers=2)
