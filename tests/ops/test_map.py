"""What the job of deriving a map does with the file it writes; maps themselves are in ``tests/derivation``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unmergeable import ops
from unmergeable.checkpoint.disk import _temporary
from unmergeable.errors import UsageError


def test_a_file_that_is_there_stays_and_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    """A process that is killed between naming the whole file and removing its temporary name leaves both."""
    out = tmp_path / "map.json"
    out.write_text("{}")
    os.link(out, _temporary(out, 0))
    with pytest.raises(UsageError, match="exists and is never overwritten"):
        ops.derive_map("llama", out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]
    assert out.read_text() == "{}"
