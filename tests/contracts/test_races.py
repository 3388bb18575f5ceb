"""Several at once on one OUT and one key: at least one succeeds, the others say why not, and the key opens OUT."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from unmergeable import ops
from unmergeable.checkpoint.manifest import check_files
from unmergeable.checkpoint.partial import partial_of
from unmergeable.errors import BadInput, KeyFileError, NotEquivalent
from unmergeable.gauge.key import Key, read_key, write_key
from unmergeable.ops import protection
from zoo import TOYS, write_toy


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "expert")):
        write_toy(TOYS["gpt2"], tmp_path / name, seed=seed)
    return tmp_path


@pytest.mark.parametrize("count", [2, 5])
def test_several_protect_into_one_folder(work: Path, count: int) -> None:
    barrier, done, refused = threading.Barrier(count), list[str](), list[Exception]()

    def protect() -> None:
        barrier.wait()
        try:
            result = ops.protect(work / "expert", base=work / "base", out=work / "out", method="mergelock", threads=1)
        except Exception as error:
            refused.append(error)
        else:
            done.append(str(result.fingerprint))

    threads = [threading.Thread(target=protect) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) + len(refused) == count
    assert [error for error in refused if not isinstance(error, BadInput | KeyFileError)] == []
    assert set(done) == {read_key(work / "out.key").fingerprint}, "one key, and that of the release"
    assert check_files(work / "out") == ()
    ops.restore(work / "out", key=work / "out.key", out=work / "restored")


def test_a_failure_takes_no_key_from_another_process(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that made the key fails just as another has finished with it."""
    write = protection._write

    def finished_by_another(*arguments: object) -> object:
        write(*arguments)  # type: ignore[arg-type]
        assert not partial_of(work / "out").exists()
        raise BadInput("was just finished by another process")

    with monkeypatch.context() as patch:
        patch.setattr(protection, "_write", finished_by_another)
        with pytest.raises(BadInput):
            ops.protect(work / "expert", base=work / "base", out=work / "out", method="mergelock")
    ops.restore(work / "out", key=work / "out.key", out=work / "restored")


def test_a_key_that_was_taken_away_meanwhile_is_there_in_the_end(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = protection._write

    def without_key(*arguments: object) -> object:
        (work / "out.key").unlink()
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(protection, "_write", without_key)
    ops.protect(work / "expert", base=work / "base", out=work / "out", method="mergelock")
    ops.restore(work / "out", key=work / "out.key", out=work / "restored")


def test_a_key_that_opens_nothing_goes(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what fails for good leaves no key, beside somebody else's OUT neither."""

    def fail(*arguments: object) -> object:
        raise NotEquivalent("it would not compute the same")

    with monkeypatch.context() as patch:
        patch.setattr(protection, "_write", fail)
        with pytest.raises(NotEquivalent):
            ops.protect(work / "expert", base=work / "base", out=work / "out", method="mergelock")
    assert not (work / "out.key").exists()
    ops.protect(work / "expert", base=work / "base", out=work / "out", method="gauge")
    with pytest.raises(BadInput, match="exists"):
        ops.protect(work / "expert", base=work / "base", out=work / "out", method="mergelock", key=work / "k")
    assert not (work / "k").exists()


def test_a_key_that_another_process_made_first_is_not_passed_over(tmp_path: Path) -> None:
    """Both saw no key and drew one: who comes second must not write a release that the file does not open."""
    path, ours, theirs = tmp_path / "k", Key(bytes(32), {}), Key(bytes([1]) * 32, {})
    write_key(path, theirs)
    with pytest.raises(KeyFileError, match="another process"), protection.kept_key(path, ours, None, tmp_path / "out"):
        pytest.fail("nothing may be written")
    with protection.kept_key(path, theirs, None, tmp_path / "out"):  # the control: the same key goes on
        pass
    assert read_key(path) == theirs
