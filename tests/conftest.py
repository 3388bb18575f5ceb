"""No test uses the network (:mod:`offline`), and none writes keys into the folder of whoever runs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from offline import ATTEMPTS, refuse_network


def pytest_configure() -> None:
    sys.addaudithook(refuse_network)
    os.environ["UNMERGEABLE_KEYS"] = "beside"  # tests/ops/test_key_places.py is about the default


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    ATTEMPTS.clear()
    yield
    assert not ATTEMPTS, "whoever caught the error went on without what it wanted from there"
