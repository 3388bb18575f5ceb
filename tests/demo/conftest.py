from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from unmergeable.demo.model import write_base_checkpoint


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone as a checkpoint. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("demo") / "base"
    write_base_checkpoint(folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from more, and lose much when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
