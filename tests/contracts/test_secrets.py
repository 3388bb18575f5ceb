"""Nothing but the key file holds the secret, in any form: outputs, logs, errors, files on their way, process lines."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unmergeable.gauge.key import read_key
from unmergeable.randomness import Stream
from zoo import TOYS, write_toy

PASSPHRASE, NEW_PASSPHRASE = "correct horse battery staple", "another horse of another stable"
SEED = 918273645501928

# Runs every command in one process. What is written through the calls by which this package writes, and every line of
# a process that is started, goes to a file as well.
EVERY_COMMAND = """
import json, os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
real_write = os.write
def noted(real):
    def call(descriptor, data, *more):
        real_write(log, bytes(data))
        return real(descriptor, data, *more)
    return call
os.write, os.pwrite = noted(os.write), noted(os.pwrite)
def spawned(event, arguments):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn"):
        real_write(log, repr(arguments).encode())
sys.addaudithook(spawned)
from unmergeable.cli import main
for environment, command, code in json.load(sys.stdin):
    os.environ.update(environment)
    found = main([*command, "--debug"])
    if found != code:
        sys.exit(f"{command}: {found}")
"""


def forms(secret: bytes) -> Iterator[bytes]:
    """A secret as it is, in hex, in Python's notation and in base64, wherever in a longer text it begins."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    yield repr(secret)[2:-1].encode()
    yield json.dumps(list(secret)).encode()
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + secret)
        # The first and last characters depend on what stands beside it.
        middle = encoded[(4 * shift + 2) // 3 + 1 : -4]
        yield middle
        yield middle.replace(b"+", b"-").replace(b"/", b"_")


def holds(content: bytes, secret: bytes) -> bool:
    return any(form in content for form in forms(secret))


@pytest.mark.parametrize("shift", range(7))
def test_a_secret_is_found_in_every_form(shift: int) -> None:
    """The control of what follows."""
    secret = hashlib.sha256(b"x").digest()
    for content in (secret, secret.hex().encode(), str(secret).encode(), str(list(secret)).encode()):
        assert holds(b"a" * shift + content + b"b", secret)
    assert holds(base64.b64encode(b"a" * shift + secret + b"b"), secret)
    assert holds(base64.urlsafe_b64encode(b"a" * shift + secret + b"b"), secret)
    assert not holds(hashlib.sha256(secret).digest() * 4, secret)


def test_a_full_run_shows_no_secret(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "expert")):
        write_toy(TOYS["llama"], tmp_path / name, seed=seed)
    key, again = "release.key", "again.key"
    first = {"UNMERGEABLE_PASSPHRASE": PASSPHRASE}
    wrong = {"UNMERGEABLE_PASSPHRASE": "wrong"}
    changed = {"UNMERGEABLE_PASSPHRASE": NEW_PASSPHRASE}
    release = ["--base", "base", "--method", "gauge"]
    both = ["--expert", "release", "--expert", "expert"]
    commands = [
        (first, ["protect", "expert", *release, "--out", "release", "--json"], 0),
        (first, ["restore", "release", "--key", key, "--out", "restored"], 0),
        (wrong, ["restore", "release", "--key", key, "--out", "x"], 5),
        (first, ["rotate", "release", "--key", key, "--out", "again"], 0),
        (first, ["key", "show", key, "release", "again", "--json"], 0),
        ({**first, "UNMERGEABLE_NEW_PASSPHRASE": NEW_PASSPHRASE}, ["key", "change-passphrase", again], 0),
        (first, ["restore", "again", "--key", again, "--out", "x"], 5),
        (changed, ["restore", "again", "--key", again, "--out", "twice"], 0),
        (changed, ["verify", "release", "again"], 0),
        (changed, ["verify", "again", "--manifest"], 0),
        (changed, ["inspect", "release", "--base", "base"], 0),
        (changed, ["recover", "release", "--base", "base", "--method", "nearest_orbit", "--out", "recovered"], 0),
        (changed, ["merge", *both, "--base", "base", "--method", "ties", "--out", "merged"], 0),
        (changed, ["protect", "expert", *release, "--out", "public", "--seed", str(SEED)], 0),
    ]
    log, temporary = tmp_path / "log", tmp_path / "temporary"
    temporary.mkdir()
    (tmp_path / "work").mkdir()
    for name in ("base", "expert"):
        (tmp_path / name).rename(tmp_path / "work" / name)
    ran = subprocess.run(
        [sys.executable, "-c", EVERY_COMMAND, str(log)],
        input=json.dumps(commands).encode(),
        cwd=tmp_path / "work",
        env={**os.environ, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]

    keys = {
        name: read_key(tmp_path / "work" / f"{name}.key", passphrase)
        for name, passphrase in (("release", PASSPHRASE), ("again", NEW_PASSPHRASE), ("public", NEW_PASSPHRASE))
    }
    secrets = {"passphrase": PASSPHRASE.encode(), "new passphrase": NEW_PASSPHRASE.encode()}
    for name, secret in keys.items():
        secrets[f"key of {name}"] = secret.entropy
        secrets[f"stream of {name}"] = Stream.from_entropy(secret.entropy).key
        signing = hashlib.blake2b(secret.entropy, digest_size=32, person=b"unmergeable-sig").digest()
        secrets[f"signing key of {name}"] = signing
    places = {"stdout": ran.stdout, "stderr": ran.stderr, "written or spawned": log.read_bytes()}
    for folder in (tmp_path / "work", temporary):
        places |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert [
        (place, name) for place, content in places.items() for name, s in secrets.items() if holds(content, s)
    ] == []
    in_files = [place for place, content in places.items() if place.startswith("/") and str(SEED).encode() in content]
    assert in_files == [], "a public seed is told to who gave it, and to nobody else"
    assert str(SEED).encode() in ran.stderr, "control"
    encrypted = json.loads((tmp_path / "work" / key).read_text())["encrypted_secret"]["ciphertext"]
    assert encrypted.encode() in places["written or spawned"], "control: what was written was seen"
