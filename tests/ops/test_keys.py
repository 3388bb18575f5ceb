"""Keys after the release: what a file opens, another passphrase, a new key for an old release, and signatures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import unmergeable
from unmergeable import ops
from unmergeable.checkpoint.manifest import read_manifest
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import BadInput, KeyFileError, UsageError
from unmergeable.gauge import key as key_module
from unmergeable.gauge.key import Key, read_key
from unmergeable.gauge.signature import is_signed, public_key_of, sign
from zoo import TOYS, write_toy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("base", "expert")):
        write_toy(TOYS["llama"], folder / name, seed=seed)
    ops.protect(folder / "expert", base=folder / "base", out=folder / "release", method="gauge")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A base, an expert, and its release with the key."""
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_module, "SCRYPT", {"n": 2, "r": 8, "p": 1})


def largest_difference(first: Path, second: Path) -> float:
    """Relative, over all tensors."""
    sources = Checkpoint.open(first), Checkpoint.open(second)
    pairs = [(sources[0].tensor(name), sources[1].tensor(name)) for name in sources[0].names]
    return max(float((one - other).norm() / one.norm()) for one, other in pairs)


def test_a_key_tells_what_it_opens(work: Path) -> None:
    ops.protect(work / "expert", base=work / "base", out=work / "other", method="gauge")
    shown = ops.show_key(work / "release.key", releases=[work / "release", work / "other", work / "expert"])
    assert list(shown.opens.values()) == [True, False, False]
    assert shown.fingerprint == read_key(work / "release.key").fingerprint
    secret = json.loads((work / "release.key").read_text())["secret"]
    assert secret not in json.dumps(shown.to_json()) + "".join(shown.lines())


@pytest.mark.usefixtures("cheap_scrypt")
def test_another_passphrase_and_the_same_key(work: Path) -> None:
    path = work / "release.key"
    before = read_key(path)
    path.with_name("link.key").symlink_to(path)
    ops.change_passphrase(path.with_name("link.key"), new="first")
    assert path.with_name("link.key").is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert ops.show_key(path).public_key is None
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        ops.change_passphrase(path, passphrase="wrong", new="second")
    with pytest.raises(KeyFileError, match="is encrypted"):
        ops.change_passphrase(path, new="second")
    ops.change_passphrase(path, passphrase="first", new="second")
    assert read_key(path, "second") == before
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        read_key(path, "first")
    ops.change_passphrase(path, passphrase="second", new=None)
    assert read_key(path) == before


@pytest.mark.usefixtures("cheap_scrypt")
def test_a_key_that_is_as_it_is_asked_to_be_stays_as_it_is(work: Path) -> None:
    """The same call again, after one that the disk broke off behind the rename."""
    path = work / "release.key"
    plain = path.read_bytes()
    ops.change_passphrase(path)
    assert path.read_bytes() == plain
    for new in ("first", None):
        ops.change_passphrase(path, passphrase=None if new else "first", new=new)
        written = path.read_bytes()
        again = ops.change_passphrase(path, passphrase=None if new else "first", new=new)
        assert path.read_bytes() == written
        assert again.fingerprint == read_key(path, new).fingerprint


def test_a_release_under_a_new_key_gives_the_original_back(work: Path) -> None:
    rotated = ops.rotate(work / "release", key=work / "release.key", out=work / "again")
    assert rotated.fingerprint != read_key(work / "release.key").fingerprint
    ops.restore(work / "again", key=rotated.key, out=work / "restored")
    # Two roundings of float32 (2^-24) on the way, each at most amplified by the squared condition bound of the bases.
    manifest = read_manifest(work / "again")
    assert manifest is not None
    assert (
        largest_difference(work / "expert", work / "restored") <= 2 * 2**-24 * manifest.details["condition_bound"] ** 2
    )
    assert largest_difference(work / "release", work / "again") > 0.1, "control: another basis altogether"
    assert unmergeable.verify(work / "expert", work / "again").is_equal
    with pytest.raises(KeyFileError, match="is not the key of"):
        ops.restore(work / "again", key=work / "release.key", out=work / "wrong")
    assert not {path.name for path in work.iterdir()} & {"wrong", "wrong.partial", "again.partial"}


def test_rotating_again_knows_its_result(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"key": work / "release.key", "out": work / "again"}
    first = ops.rotate(work / "release", **options)
    assert ops.rotate(work / "release", **options).fingerprint == first.fingerprint
    assert "is complete" in caplog.text
    with pytest.raises(KeyFileError, match="would lie inside"):
        ops.rotate(work / "release", key=work / "release.key", out=work / "x", new_key=work / "x" / "k")
    with pytest.raises(BadInput, match="lie inside each other"):
        ops.rotate(work / "release", key=work / "release.key", out=work / "release" / "x")


def test_an_order_that_was_found_cannot_be_found_again(work: Path) -> None:
    ops.protect(work / "expert", base=work / "base", out=work / "ordered", method="params")
    with pytest.raises(UsageError, match="restore that, and protect it again"):
        ops.rotate(work / "ordered", key=work / "ordered.key", out=work / "again")
    assert not (work / "again.key").exists()


def test_a_signature_is_of_one_message_by_one_key() -> None:
    first, second = Key(bytes(32), {}), Key(bytes([1]) * 32, {})
    signature = sign(first, b"release")
    assert is_signed(b"release", signature)
    assert sign(first, b"release") == signature
    assert not is_signed(b"another", signature)
    assert not is_signed(b"release", {**signature, "public_key": public_key_of(second)})
    for spoiled in (
        {},
        {**signature, "value": "no hex"},
        {**signature, "algorithm": 1},
        {**signature, "public_key": 7},
    ):
        assert not is_signed(b"release", spoiled)
    assert first.entropy.hex() not in json.dumps(signature)


def altered_file(release: Path) -> None:
    weights = release / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def altered_manifest(release: Path) -> None:
    file = release / "unmergeable.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "note": "It cannot be merged."}))


def signed_by_somebody_else(release: Path) -> None:
    manifest = read_manifest(release)
    assert manifest is not None
    file = release / "unmergeable.json"
    signature = sign(Key(bytes(32), {}), manifest.signed_bytes)
    file.write_text(json.dumps({**json.loads(file.read_text()), "signature": signature}))


def unsigned(release: Path) -> None:
    file = release / "unmergeable.json"
    document = json.loads(file.read_text())
    del document["signature"]
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("spoil", "is_noticed_by_strangers"),
    [(altered_file, True), (altered_manifest, True), (signed_by_somebody_else, False), (unsigned, False)],
)
def test_who_knows_the_public_key_notices_every_change(work: Path, spoil: Any, is_noticed_by_strangers: bool) -> None:
    public_key = ops.show_key(work / "release.key").public_key
    assert ops.verify_manifest(work / "release", public_key=public_key).is_intact, "control"
    spoil(work / "release")
    assert not ops.verify_manifest(work / "release", public_key=public_key).is_intact
    assert ops.verify_manifest(work / "release").is_intact == (not is_noticed_by_strangers)


def test_a_composition_is_signed_as_a_whole(made: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "mergeguard,gauge", "settings": {"stages": "masking", "excluded_layers": 0}}
    ops.protect(made / "expert", base=made / "base", out=tmp_path / "out", **options)
    public_key = ops.show_key(tmp_path / "out.key").public_key
    found = ops.verify_manifest(tmp_path / "out", public_key=public_key)
    assert found.is_intact
    assert found.signer == public_key
    again = ops.rotate(tmp_path / "out", key=tmp_path / "out.key", out=tmp_path / "again")
    restored = ops.restore(tmp_path / "again", key=again.key, out=tmp_path / "restored")
    assert restored.note is not None
    assert "mergeguard" in restored.note


def test_what_is_no_public_key_is_refused(work: Path) -> None:
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        ops.verify_manifest(work / "release", public_key="abc")
    with pytest.raises(BadInput, match=r"has no unmergeable\.json"):
        ops.verify_manifest(work / "expert")
