"""Where keys are by default: in a folder of the user's, found again by the same command and by `restore`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from unmergeable import ops
from unmergeable.cli import main
from unmergeable.errors import KeyFileError
from unmergeable.gauge.key import describe_key, read_key
from unmergeable.ops.key_places import VARIABLE, default_key, find_key, key_folder
from zoo import TOYS, write_toy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("base", "expert")):
        write_toy(TOYS["llama"], folder / name, seed=seed)
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of keys of a user who set nothing."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".local" / "share" / "unmergeable" / "keys"


def protect(work: Path, name: str = "release", **more: object) -> ops.protection.ProtectResult:
    given = {"base": work / "base", "out": work / name, "method": "mergelock", **more}
    return ops.protect(work / "expert", **given)  # type: ignore[arg-type]


def test_a_key_lies_in_the_users_folder_and_nowhere_else(work: Path, keys: Path) -> None:
    result = protect(work)
    assert result.key is not None
    assert result.key.parent == keys
    assert sorted(path.name for path in work.iterdir()) == ["base", "expert", "release"]
    assert keys.stat().st_mode & 0o777 == 0o700
    assert result.key.stat().st_mode & 0o777 == 0o600
    assert "beside" not in "\n".join(result.lines())


def test_a_key_beside_the_release_is_told(work: Path) -> None:
    """The control of the test above: it is what the tests of everything else set."""
    result = protect(work)
    assert result.key == work / "release.key"
    assert "never the folder around both" in "\n".join(result.lines())


def test_restore_and_rotate_find_the_key(work: Path, keys: Path) -> None:
    first, second = protect(work, "first"), protect(work, "second")
    assert first.fingerprint != second.fingerprint
    (work / "first").rename(work / "moved")
    assert ops.restore(work / "moved", out=work / "restored").fingerprint == first.fingerprint
    rotated = ops.rotate(work / "second", out=work / "third")
    assert rotated.key.parent == keys
    assert ops.restore(work / "third", out=work / "again").fingerprint == rotated.fingerprint


def test_the_command_line_needs_no_key(work: Path, keys: Path) -> None:
    release = str(work / "release")
    assert main(["protect", str(work / "expert"), "--base", str(work / "base"), "--out", release, "--quiet"]) == 0
    assert main(["restore", release, "--out", str(work / "restored"), "--quiet"]) == 0
    assert main(["verify", str(work / "expert"), str(work / "restored"), "--quiet"]) == 0


def test_releases_of_one_name_in_two_places_have_two_keys(work: Path, keys: Path) -> None:
    for place in ("a", "b"):
        (work / place).mkdir()
        protect(work, f"{place}/release")
    assert len(list(keys.iterdir())) == 2
    for place in ("a", "b"):
        ops.restore(work / place / "release", out=work / f"restored-{place}")


def test_the_same_place_named_otherwise_has_the_same_key(
    work: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "link").symlink_to(work)
    monkeypatch.chdir(work)
    names = {default_key(Path(text)) for text in ("release", "./release", "link/release", f"{work}/release")}
    assert len(names) == 1


def test_the_same_command_goes_on_with_its_key(work: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ops.protection, "write_prepared", broken)
        with pytest.raises(KeyboardInterrupt):
            protect(work)
    (path,) = keys.iterdir()
    before = read_key(path)
    assert protect(work).fingerprint == before.fingerprint


def test_a_dry_run_makes_no_folder(work: Path, keys: Path) -> None:
    result = protect(work, dry_run=True)
    assert result.key is not None
    assert result.key.parent == keys
    assert not keys.exists()
    assert not (work.parent / "home").exists()


def test_no_folder_is_made_where_there_is_no_key(work: Path, keys: Path) -> None:
    ops.protect(work / "expert", base=work / "base", out=work / "release", keep_adapter=False, key=work / "mine.key")
    assert not keys.exists()


def test_what_lies_there_besides_is_passed_over(work: Path, keys: Path) -> None:
    result = protect(work)
    assert result.key is not None
    (keys / "a.key").write_text("no key")
    shutil.copy(result.key, keys / "b.key")
    (keys / "b.key").chmod(0o644)
    assert find_key(work / "release", result.fingerprint) == result.key


def test_a_key_that_is_not_there_is_told_with_the_places(work: Path, keys: Path) -> None:
    result = protect(work)
    assert result.key is not None
    result.key.rename(work / "elsewhere.key")
    with pytest.raises(KeyFileError, match=rf"neither in {keys} nor beside .*--key FILE") as caught:
        ops.restore(work / "release", out=work / "restored")
    assert caught.value.exit_code == 5
    ops.restore(work / "release", key=work / "elsewhere.key", out=work / "restored")
    (work / "elsewhere.key").rename(work / "release.key")
    ops.restore(work / "release", out=work / "again")


def test_a_copy_without_a_manifest_wants_the_key_named(work: Path, keys: Path) -> None:
    result = protect(work)
    (work / "release" / "unmergeable.json").unlink()
    with pytest.raises(KeyFileError, match="does not say which key"):
        ops.restore(work / "release", out=work / "restored")
    ops.restore(work / "release", key=result.key, out=work / "restored")


def test_the_folder_can_be_another(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(work / "safe" / "keys"))
    result = protect(work)
    assert result.key is not None
    assert result.key.parent == work / "safe" / "keys"
    assert describe_key(result.key).fingerprint == result.fingerprint
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert key_folder() == Path("/data/unmergeable/keys")
    monkeypatch.setenv("XDG_DATA_HOME", "not/absolute")
    assert key_folder() == Path.home() / ".local" / "share" / "unmergeable" / "keys"


def test_a_folder_that_others_may_write_to_is_refused(work: Path, keys: Path) -> None:
    keys.mkdir(parents=True)
    keys.chmod(0o777)
    with pytest.raises(KeyFileError, match=rf"chmod 700 {keys}"):
        protect(work)
    assert not (work / "release").exists()
    keys.chmod(0o700)
    protect(work)


def test_a_folder_that_cannot_be_made_is_told(work: Path, keys: Path) -> None:
    (work.parent / "home").write_text("a file")
    with pytest.raises(KeyFileError, match=rf"cannot be made .*--key FILE, or name a folder of yours in {VARIABLE}"):
        protect(work)
    protect(work, key=work / "named.key")


def test_a_folder_of_keys_inside_the_release_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, os.fspath(work / "release" / "keys"))
    with pytest.raises(KeyFileError, match="would lie inside"):
        protect(work, dry_run=True)
    with pytest.raises(KeyFileError, match="would lie inside"):
        protect(work)
    assert not (work / "release").exists(), "nor is the folder left behind"


def test_out_key_means_the_key_of_out(work: Path, keys: Path, tmp_path: Path) -> None:
    """As when keys lay beside their releases; a file of that name comes first, and other names mean themselves."""
    result = protect(work)
    beside = work / "release.key"
    ops.restore(work / "release", key=beside, out=tmp_path / "restored")
    assert (tmp_path / "restored").is_dir()
    assert ops.show_key(beside).fingerprint == result.fingerprint
    other = protect(work, "other", key=beside)
    assert ops.show_key(beside).fingerprint == other.fingerprint != result.fingerprint
    with pytest.raises(KeyFileError, match=r"elsewhere\.key does not exist"):
        ops.show_key(work / "elsewhere.key")
