"""Packed credits are the credits, to the bit, in few bytes; what is damaged is refused in a line."""

from __future__ import annotations

import base64
import math
import zlib

import numpy as np
import pytest

from unmergeable.errors import BadInput
from unmergeable.evaluation.packing import pack, unpack


@pytest.mark.parametrize("size", [0, 1, 7, 8, 200])
def test_rights_and_wrongs_take_a_bit_each(size: int) -> None:
    found = (np.random.default_rng(size).random(size) < 0.5).astype(float)
    packed = pack(found)
    assert np.array_equal(unpack(packed), found)
    assert len(packed) <= len(f"bits:{size}:") + 4 * math.ceil(size / 24)


def test_other_credits_keep_every_bit() -> None:
    found = np.random.default_rng(0).random(50)
    packed = pack(found)
    assert packed.startswith("float64:50:")
    assert np.array_equal(unpack(packed), found)
    assert not np.array_equal(unpack(pack(found.round(3))), found)  # control


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bits:8",
        "bits:-1:AA==",
        "bits:x:AA==",
        "bits:8:A",
        "bits:999999999999:AA==",
        "float64:2:AA==",
        "float64:2:" + base64.b64encode(zlib.compress(b"\0" * 8)).decode(),
        "other:1:AA==",
    ],
)
def test_what_is_damaged_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="no packed credits") as error:
        unpack(text)
    assert "\n" not in str(error.value)
