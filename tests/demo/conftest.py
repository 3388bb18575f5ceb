from __future__ import annotations

from pathlib import Path

import pytest

from unmergeable.demo.model import write_base_checkpoint


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone as a checkpoint. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("demo") / "base"
    write_base_checkpoint(folder)
    return folder
