"""No test uses the network (:mod:`offline`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from offline import ATTEMPTS, refuse_network


def pytest_configure() -> None:
    sys.addaudithook(refuse_network)


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    ATTEMPTS.clear()
    yield
    assert not ATTEMPTS, "whoever caught the error went on without what it wanted from there"
