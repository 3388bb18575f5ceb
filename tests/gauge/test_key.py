"""The key file: made once, private, and read back exactly or not at all."""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unmergeable.errors import DiskError, KeyFileError
from unmergeable.gauge import key as key_module
from unmergeable.gauge.key import FORMAT, Key, describe_key, read_key, write_key
from unmergeable.randomness import Stream

ENTROPY = bytes(range(200, 232))
RECIPE: dict[str, Any] = {
    "steps": [{"method": "mergelock", "settings": {"condition": 4.0, "cross_attention": True}}],
    "architecture": "llama",
    "note": "Grüße",
}
KEY = Key(ENTROPY, RECIPE)
PASSPHRASE = "correct horse – 電池"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "release.key"


@pytest.fixture
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says what deriving costs, so that a test can ask for little."""
    monkeypatch.setitem(key_module.SCRYPT, "n", 1 << 4)


@pytest.fixture
def any_umask() -> Iterator[None]:
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


def secret_forms(entropy: bytes = ENTROPY) -> list[str]:
    """How 32 bytes could show up in a text."""
    return [entropy.hex(), base64.b64encode(entropy).decode(), repr(entropy)[2:-1], str(list(entropy))]


def rewrite(path: Path, **changes: object) -> None:
    """Change fields of a key file; None removes one."""
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


def refusal(path: Path, passphrase: str | None = None) -> str:
    """The one line with which reading is refused; it names the file and never holds the secret."""
    with pytest.raises(KeyFileError) as caught:
        read_key(path, passphrase)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert not any(form in message for form in secret_forms())
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


# ------------------------------------------------------------------------------------------------------ round trip


def test_a_key_is_read_back_as_it_was_written(path: Path) -> None:
    write_key(path, KEY)
    assert read_key(path) == KEY
    assert read_key(path).entropy == ENTROPY
    assert read_key(path, "a passphrase nobody asked for") == KEY
    assert not describe_key(path).is_encrypted


def test_a_passphrase_round_trip_at_full_cost(path: Path) -> None:
    write_key(path, KEY, PASSPHRASE)
    assert describe_key(path).is_encrypted
    assert read_key(path, PASSPHRASE) == KEY
    text = path.read_text()
    assert not any(form in text for form in secret_forms())
    assert json.loads(text)["encrypted_secret"]["n"] >= 1 << 15


def test_the_format_is_frozen(path: Path) -> None:
    """Keys must open for years: this text was written by the first version."""
    path.write_text(
        '{"format": "unmergeable-key/1", "fingerprint": "9682b4ad9793781f21a5678bfc075893",'
        ' "recipe": {"steps": [], "source": "x"},'
        ' "secret": "yMnKy8zNzs/Q0dLT1NXW19jZ2tvc3d7f4OHi4+Tl5uc="}'
    )
    path.chmod(0o600)
    key = read_key(path)
    assert key == Key(ENTROPY, {"steps": [], "source": "x"})
    assert key.stream().uniform(1).tolist() == [0.7614342369237367]


def test_the_encrypted_format_is_frozen(path: Path) -> None:
    path.write_text(
        '{"format": "unmergeable-key/1", "fingerprint": "c2f3b26c574b05c85bc01fc31e25e9ad", "recipe": {"steps'
        '": []}, "encrypted_secret": {"kdf": "scrypt", "n": 16, "r": 8, "p": 1, "cipher": "AES-256-GCM", "sal'
        't": "PpWjrnJLMcYoKWu7sJekfA==", "nonce": "euA+wwv2deYm+H6H", "ciphertext": "CxUtb66BE8g7SHyg8VM174tY'
        '8c8EiZzwUZl7FYUxiny2Q1myuk0HSoo0dj6M22iB"}}'
    )
    path.chmod(0o600)
    assert read_key(path, "golden") == Key(ENTROPY, {"steps": []})


@pytest.mark.usefixtures("cheap_scrypt")
def test_two_encryptions_of_one_key_share_nothing(tmp_path: Path) -> None:
    boxes = []
    for name in ("a", "b"):
        write_key(tmp_path / name, KEY, PASSPHRASE)
        boxes.append(json.loads((tmp_path / name).read_text())["encrypted_secret"])
    assert all(boxes[0][field] != boxes[1][field] for field in ("salt", "nonce", "ciphertext"))


# ---------------------------------------------------------------------------------- orders that no secret can redraw

ORDERS = {"0.model.layers.0.mlp.order": [2, 0, 1], "0.model.layers.1.mlp.order": [0, 70000, 3, 1]}


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_orders_are_kept_beside_the_secret(path: Path, passphrase: str | None, cheap_scrypt: None) -> None:
    key = Key(ENTROPY, RECIPE, ORDERS)
    write_key(path, key, passphrase)
    assert read_key(path, passphrase) == key
    assert "70000" not in path.read_text()
    assert "mlp.order" not in path.read_text()


def test_orders_are_part_of_what_a_fingerprint_identifies() -> None:
    others = [Key(ENTROPY, RECIPE, {**ORDERS, name: [*order[1:], order[0]]}) for name, order in ORDERS.items()]
    assert len({key.fingerprint for key in (KEY, Key(ENTROPY, RECIPE, ORDERS), *others)}) == 4
    assert Key(ENTROPY, RECIPE, {}).fingerprint == KEY.fingerprint  # keys without orders are what they were


@pytest.mark.parametrize("extra", [b"x", b"[]\n", b"{}\n1234", b'{"a": 2}\n1234', b'{"a": -1}\n', b"\xff\n"])
def test_damaged_orders_are_refused(path: Path, extra: bytes) -> None:
    write_key(path, KEY)
    rewrite(path, secret=base64.b64encode(ENTROPY + extra).decode())
    assert "damaged" in refusal(path)


# -------------------------------------------------------------------------------------------------------- privacy


@pytest.mark.usefixtures("any_umask")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o277, 0o777])
def test_the_file_is_private_whatever_the_umask(path: Path, umask: int) -> None:
    os.umask(umask)
    write_key(path, KEY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_key(path) == KEY


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o644, 0o610, 0o601, 0o777])
def test_a_file_open_to_others_is_refused(path: Path, mode: int) -> None:
    write_key(path, KEY)
    path.chmod(mode)
    message = refusal(path)
    assert "other users" in message
    assert f"chmod 600 {path}" in message
    path.chmod(0o400)  # the remedy, or something stricter, works
    assert read_key(path) == KEY


def test_nothing_shows_the_secret(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    write_key(path, KEY)
    key = read_key(path)
    texts = [repr(key), str(key), f"{key!r}", key.fingerprint, repr(key.stream()), caplog.text, json.dumps(RECIPE)]
    for text in texts:
        assert not any(form in text for form in secret_forms())
    assert any(form in path.read_text() for form in secret_forms())  # the control: there it is
    assert pickle.loads(pickle.dumps(key)) == key


def test_refusals_do_not_show_the_secret(path: Path) -> None:
    write_key(path, KEY)
    secret = json.loads(path.read_text())["secret"]
    for changes in ({"fingerprint": "0" * 32}, {"secret": secret + "AAAA"}, {"secret": [secret]}, {"format": secret}):
        write_fresh(path)
        rewrite(path, **changes)
        assert secret not in refusal(path)


def write_fresh(path: Path, passphrase: str | None = None) -> None:
    path.unlink(missing_ok=True)
    write_key(path, KEY, passphrase)


# ---------------------------------------------------------------------------------------------------- fingerprint


def test_a_fingerprint_tells_keys_and_recipes_apart() -> None:
    other_secret = Key(bytes(32), RECIPE)
    other_recipe = Key(ENTROPY, {**RECIPE, "architecture": "gpt2"})
    fingerprints = {key.fingerprint for key in (KEY, other_secret, other_recipe, Key(bytes(32), {}))}
    assert len(fingerprints) == 4
    assert all(len(fingerprint) == 32 and int(fingerprint, 16) >= 0 for fingerprint in fingerprints)


def test_a_fingerprint_does_not_depend_on_how_the_recipe_is_written(path: Path) -> None:
    backwards = dict(reversed(RECIPE.items()))
    assert Key(ENTROPY, backwards).fingerprint == KEY.fingerprint
    write_key(path, KEY)
    assert read_key(path).fingerprint == KEY.fingerprint


def test_a_fingerprint_is_not_the_stream() -> None:
    """It is published with every release: it must not be a number that gauges are drawn from."""
    assert KEY.fingerprint not in KEY.stream().key.hex()
    assert KEY.stream() == Stream.from_entropy(ENTROPY)
    assert KEY.stream().key != ENTROPY


# ------------------------------------------------------------------------------------------- what is in the way


def test_an_existing_file_is_never_overwritten(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(KeyFileError, match=r"exists and is never overwritten; .*\.$"):
        write_key(path, KEY)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("is_dangling", [True, False])
def test_writing_does_not_follow_a_link(path: Path, tmp_path: Path, *, is_dangling: bool) -> None:
    target = tmp_path / "target"
    if not is_dangling:
        target.write_text("precious")
    path.symlink_to(target)
    with pytest.raises(KeyFileError, match="exists and is never overwritten"):
        write_key(path, KEY)
    assert target.exists() != is_dangling
    assert is_dangling or target.read_text() == "precious"


def test_reading_follows_a_link_to_a_private_file(path: Path, tmp_path: Path) -> None:
    """Secret stores hand files out as links; what counts is who can read the file itself."""
    write_key(tmp_path / "stored", KEY)
    path.symlink_to(tmp_path / "stored")
    assert read_key(path) == KEY
    (tmp_path / "stored").chmod(0o644)
    assert "other users" in refusal(path)
    (tmp_path / "stored").unlink()
    assert "does not exist" in refusal(path)


def test_a_key_of_another_user_is_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They could exchange it for one of theirs, or the link to it."""
    write_key(path, KEY)
    link = tmp_path / "link"
    link.symlink_to(path)
    if os.geteuid() == 0:
        os.chown(path, 1234, -1)
    assert read_key(path) == KEY, "the superuser reads every key, and everybody their own"
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    assert read_key(path) == KEY
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    for file in (path, link):
        assert "belongs to another user" in refusal(file)


@pytest.mark.parametrize("check", [read_key, describe_key])
def test_what_is_no_regular_file_is_refused(path: Path, check: Any) -> None:
    path.mkdir(mode=0o700)
    with pytest.raises(KeyFileError, match=r"is not a regular file; check the path\.$"):
        check(path)
    path.rmdir()
    os.mkfifo(path, 0o600)  # must not wait for a writer that never comes
    with pytest.raises(KeyFileError, match="is not a regular file"):
        check(path)
    with pytest.raises(KeyFileError, match="exists and is never overwritten"):
        write_key(path, KEY)


def test_a_file_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"cannot be created: No such file or directory; choose another place\.$"):
        write_key(tmp_path / "nowhere" / "k", KEY)
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError, match="cannot be created: Not a directory"):
        write_key(tmp_path / "file" / "k", KEY)
    with pytest.raises(KeyFileError, match="cannot be read: Not a directory"):
        read_key(tmp_path / "file" / "k")
    assert "does not exist" in refusal(tmp_path / "nowhere" / "k")


def test_a_full_disk_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"disk full while writing .*: free space"):
        write_key(path, KEY)
    assert not path.exists()
    monkeypatch.undo()
    write_key(path, KEY)
    assert read_key(path) == KEY


def test_a_recipe_that_is_no_json_leaves_nothing_behind(path: Path) -> None:
    with pytest.raises(TypeError):
        write_key(path, Key(ENTROPY, {"method": object()}))
    assert not path.exists()


def test_the_file_and_its_name_are_brought_to_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(stat.S_IFMT(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_key(path, KEY)
    assert synced == [stat.S_IFREG, stat.S_IFDIR]


# ------------------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 64,
        b"\xff\xfe\x00garbage",
        b"not json",
        b"[]",
        b'"text"',
        b"3",
        b"null",
        b"[" * 100_000,
        b"{}",
        b'{"format": "unmergeable-key/2", "recipe": {}}',
        b'{"format": "unmergeable-key/1", "recipe": []}',
        b'{"format": "unmergeable-key/1", "recipe": null}',
        b" " * (2 << 20) + b"{}",
    ],
    ids=lambda content: repr(content[:30]),
)
def test_another_file_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    assert f"is not a key file of this tool (format {FORMAT})" in refusal(path)


def test_a_truncated_file_is_refused_wherever_it_ends(path: Path) -> None:
    write_key(path, KEY)
    content = path.read_bytes()
    for length in range(0, len(content.rstrip()) - 1, 7):
        path.write_bytes(content[:length])
        refusal(path)
    path.write_bytes(content)
    assert read_key(path) == KEY


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "0" * 32},
        {"fingerprint": None},
        {"fingerprint": 7},
        {"recipe": {**RECIPE, "architecture": "gpt2"}},
        {"recipe": {}},
        {"secret": None},
        {"secret": ""},
        {"secret": 5},
        {"secret": {}},
        {"secret": "AAAA"},
        {"secret": "!!!"},
        {"secret": base64.b64encode(bytes(32)).decode()},
        {"secret": base64.b64encode(bytes(33)).decode()},
        {"secret": base64.b64encode(bytes(100)).decode()},
        {"secret": "é" * 44},
    ],
    ids=str,
)
def test_an_altered_field_is_refused(path: Path, changes: dict[str, object]) -> None:
    write_key(path, KEY)
    rewrite(path, **changes)
    assert "damaged" in refusal(path)


@pytest.mark.usefixtures("cheap_scrypt")
def test_a_wrong_or_missing_passphrase_is_refused(path: Path) -> None:
    write_key(path, KEY, PASSPHRASE)
    assert "wrong passphrase" in refusal(path, "wrong")
    assert "wrong passphrase" in refusal(path, PASSPHRASE + " ")
    assert "wrong passphrase" in refusal(path, "")
    assert "is encrypted; give its passphrase" in refusal(path)
    assert read_key(path, PASSPHRASE) == KEY


@pytest.mark.usefixtures("cheap_scrypt")
@pytest.mark.parametrize(
    "changes",
    [
        {"n": 0},
        {"n": -16},
        {"n": 17},
        {"n": "many"},
        {"n": None},
        {"n": float("inf")},
        {"n": float("nan")},
        {"n": 1 << 40},  # would ask for terabytes
        {"r": 0},
        {"p": 0},
        {"p": 1 << 24},  # would take hours
        {"kdf": "md5"},
        {"cipher": "none"},
        {"salt": ""},
        {"salt": "AAAA"},
        {"nonce": ""},
        {"nonce": base64.b64encode(bytes(12)).decode()},
        {"ciphertext": ""},
        {"ciphertext": base64.b64encode(bytes(48)).decode()},
        {"ciphertext": 1},
    ],
    ids=str,
)
def test_an_altered_encryption_is_refused(path: Path, changes: dict[str, object]) -> None:
    write_key(path, KEY, PASSPHRASE)
    box = json.loads(path.read_text())["encrypted_secret"]
    rewrite(path, encrypted_secret={**box, **changes})
    refusal(path, PASSPHRASE)
    for name in changes:
        rewrite(path, encrypted_secret={field: value for field, value in box.items() if field != name})
        refusal(path, PASSPHRASE)


@pytest.mark.usefixtures("cheap_scrypt")
@pytest.mark.parametrize("box", ["text", [1], 3, {}, True])
def test_an_encryption_of_another_shape_is_refused(path: Path, box: object) -> None:
    write_key(path, KEY, PASSPHRASE)
    rewrite(path, encrypted_secret=box)
    assert "damaged" in refusal(path, PASSPHRASE)


@pytest.mark.usefixtures("cheap_scrypt")
def test_the_recipe_is_sealed_with_the_secret(path: Path) -> None:
    """Settings of a restore cannot be changed under somebody who knows the passphrase but not the file."""
    write_key(path, KEY, PASSPHRASE)
    rewrite(path, recipe={**RECIPE, "architecture": "gpt2"})
    refusal(path, PASSPHRASE)


@pytest.mark.usefixtures("cheap_scrypt")
@pytest.mark.parametrize("passphrase", [None, PASSPHRASE], ids=["plain", "encrypted"])
def test_no_flipped_bit_gives_another_key(path: Path, passphrase: str | None) -> None:
    write_key(path, KEY, passphrase)
    content = path.read_bytes()
    places = (Stream.from_seed(0).uniform(200, 2) * [len(content), 8]).astype(int).tolist()
    refused = 0
    for place, bit in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            # A flip in white space, or in the passphrase's cost by a leading zero, may leave the key what it was.
            assert read_key(path, passphrase) == KEY
        except KeyFileError:
            refused += 1
    assert refused > 150


def test_no_descriptor_stays_open(path: Path) -> None:
    def open_descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    if not Path("/proc/self/fd").exists():
        pytest.skip("counts descriptors through /proc")
    before = open_descriptors()
    write_key(path, KEY)
    read_key(path)
    path.chmod(0o644)
    refusal(path)
    path.unlink()
    path.mkdir()
    refusal(path)
    assert open_descriptors() == before


def test_an_empty_passphrase_protects_nothing_and_is_refused(path: Path) -> None:
    with pytest.raises(KeyFileError, match="passphrase is empty"):
        write_key(path, KEY, "")
    assert not path.exists()
