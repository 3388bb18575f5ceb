"""Files as a stranger might have them: valid ones, changed where their format has something to change.

Every mutation is drawn from a seed. None is aimed at what other software gets wrong.
"""

from __future__ import annotations

import copy
import io
import json
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

Mutation = Callable[[bytes, Random], bytes]

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e12, 1e300, "", "0", "1000000000", "a" * 3000,
    "../x", "/etc/hostname", "\x00", "\ud7ff", "é\n", "(a+)+$", [], {}, [[]], [None], {"": None}, [[[[[[[[1]]]]]]]],
)  # fmt: skip
"""Values that something else is expected instead of."""


MOST_PLACES = 100_000


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in _places(child, (*path, key)))]


def _size(value: Any, known: dict[int, int]) -> int:
    """How many places a value has, where YAML's aliases share parts of it."""
    if id(value) not in known:
        known[id(value)] = 1  # also what it counts for inside itself
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        known[id(value)] += sum(_size(child, known) for child in children)
    return known[id(value)]


def mutated_value(value: Any, random: Random) -> Any:
    """A JSON-able value with one to three places changed, removed, doubled, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 2, 3))):
        *parents, last = random.choice(_places(value)) or (None,)
        if last is None:
            return copy.deepcopy(random.choice(ODD))
        owner = value
        for step in parents:
            owner = owner[step]
        _change(owner, last, value, random)
    return value


def _change(owner: Any, key: Any, whole: Any, random: Random) -> None:
    kind = random.randrange(6)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[random.choice(("", "x", str(key) + "s", "__proto__", "a.b", str(key).upper()))] = owner.pop(key)
    elif kind == 2 and isinstance(owner, list):
        owner.extend([copy.deepcopy(owner[key])] * random.choice((1, 3, 500)))
    elif kind == 3:
        step = random.choice(_places(whole))
        other = whole
        for part in step:
            other = other[part]
        owner[key] = copy.deepcopy(other)
    elif kind == 4 and isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
        owner[key] = random.choice((-owner[key], owner[key] + 1, owner[key] * 1000, float(owner[key]), str(owner[key])))
    else:
        owner[key] = copy.deepcopy(random.choice(ODD))


def bytes_changed(data: bytes, random: Random) -> bytes:
    """Bits flipped, pieces removed, doubled or moved, or the end cut off."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at, kind = random.randrange(len(changed) + 1), random.randrange(5)
        end = min(len(changed), at + random.choice((1, 4, 64)))
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del changed[at:end]
        elif kind == 2:
            changed[at:at] = changed[at:end] * random.choice((1, 2, 100))
        elif kind == 3:
            changed[at:end] = random.randbytes(end - at)
        else:
            del changed[at:]
    return bytes(changed)


def json_changed(data: bytes, random: Random) -> bytes:
    """Another document, or the same with a name twice, deep nesting, or damaged text."""
    kind = random.randrange(10)
    if kind == 0:
        return bytes_changed(data, random)
    if kind == 1:
        depth = random.choice((50, 2000, 100_000))
        return b"[" * depth + data + b"]" * depth
    if kind == 2 and data.lstrip().startswith(b"{"):
        return data.replace(b"{", b"{" + data.strip()[1:-1].split(b",")[0] + b",", 1)
    if kind == 3:
        return b"\xef\xbb\xbf" + data
    return json.dumps(mutated_value(json.loads(data), random)).encode()


def lines_changed(data: bytes, random: Random) -> bytes:
    """One of several lines of JSON changed."""
    lines = data.splitlines()
    at = random.randrange(len(lines))
    lines[at] = json_changed(lines[at], random)
    return b"\n".join(lines)


def yaml_changed(data: bytes, random: Random) -> bytes:
    """Another document, or one with what only YAML has: aliases, tags, dates, merge keys, several documents."""
    kind = random.randrange(8)
    if kind == 0:
        return bytes_changed(data, random)
    value = yaml.safe_load(data)
    if _size(value, {}) > MOST_PLACES:  # written out, it would fill the memory of whoever fuzzes
        return bytes_changed(data, random)
    text = yaml.safe_dump(mutated_value(value, random))
    if kind == 1:
        extra = random.choice(
            ("x: 2020-13-45", "x: 2020-01-01", "x: !!binary aGk=", "x: !!python/name:os.system ''", "x: !!set {a, b}",
             "x: &a [*a]", "<<: 3", "? [a]\n: b", "x: .inf", "x: 0b102", "x: 1:70", "---\nx: 1", "x: !!timestamp no")
        )  # fmt: skip
        return f"{text}\n{extra}\n".encode()
    if kind == 2:
        names = "abcdefgh"
        bomb = "\n".join(
            f"{name}: &{name} [{', '.join([f'*{names[n - 1]}'] * 9) if n else 'x'}]" for n, name in enumerate(names)
        )
        return f"{text}\n{bomb}\n".encode()
    return text.encode()


def safetensors_changed(data: bytes, random: Random) -> bytes:
    """The length, the header or the tensors' bytes changed."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = random.randrange(5)
    if kind == 0:
        return struct.pack("<Q", random.choice((0, 1, length - 1, length + 8, 2**32, 2**62, 2**64 - 1))) + data[8:]
    if kind == 1:
        return bytes_changed(data, random)
    if kind == 2:
        return data[:8] + header + bytes_changed(body, random)
    header = json_changed(header, random)
    return struct.pack("<Q", len(header)) + header + body


def archive_changed(data: bytes, random: Random) -> bytes:
    """A zip archive with a member changed, doubled, left out or renamed, or its own bytes changed."""
    if random.randrange(3) == 0:
        return bytes_changed(data, random)
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w") as new:
        names = old.namelist()
        at = random.randrange(len(names))
        for number, name in enumerate(names):
            content, kind = old.read(name), random.randrange(4) if number == at else 4
            if kind != 0:
                renamed = random.choice(("x", "../x.npy", "label", name + ".npy")) if kind == 1 else name
                new.writestr(renamed, bytes_changed(content, random) if kind == 2 else content)
    return changed.getvalue()
