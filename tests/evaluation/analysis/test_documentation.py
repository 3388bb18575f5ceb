"""The example of docs/analysis.md runs as it stands."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import Task
from zoo import TOYS, write_toy

PAGE = Path(__file__).parents[3] / "docs" / "analysis.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for seed, name in enumerate(("base", "release", "theirs")):
        shutil.move(write_toy(TOYS["llama"], tmp_path / f"made {name}", seed=seed), tmp_path / name)
    vocabulary = json.loads((tmp_path / "base" / "config.json").read_text())["vocab_size"]
    ids = torch.randint(vocabulary, (2, 6), generator=torch.Generator().manual_seed(0))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(PAGE), "exec"), {"task": Task("texts", [EncodedBatch({"input_ids": ids})])})
    *parts, barrier = capsys.readouterr().out.splitlines()
    assert len(parts) == 6, "two layers of three parts"
    assert all(float(line.split()[-1]) <= float(line.split()[-2]) for line in parts), "canonical is no further away"
    assert float(barrier) >= 0
