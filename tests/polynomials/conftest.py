"""Toys with what their hidden units see, each built once; remote code is kept apart from the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from polynomials.written import Original, original

Build = Callable[..., Original]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Build:
    @cache
    def build(name: str, dtype: torch.dtype = torch.float32) -> Original:
        return original(name, tmp_path_factory.mktemp(name) / "original", dtype)

    return build


@pytest.fixture(autouse=True)
def remote_code_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies code that lies beside weights to a folder of its own; here to one of the test's."""
    import transformers.dynamic_module_utils as loading

    monkeypatch.setattr(loading, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
