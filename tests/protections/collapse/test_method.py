"""``collapse`` from files to a file: what is trained, what is refused, that a stopped run goes on to the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import unmergeable
from unmergeable.errors import UsageError
from unmergeable.network.load import load_network
from zoo import TOYS, write_toy

SETTINGS = {"steps": 6, "batch_size": 8}


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an expert in bfloat16, and images labelled by the expert."""
    folder = tmp_path_factory.mktemp("collapse")
    write_toy(TOYS["vit"], folder / "base", dtype=torch.bfloat16)
    write_toy(TOYS["vit"], folder / "expert", seed=1, dtype=torch.bfloat16)
    pixels = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = load_network(folder / "expert")(pixel_values=pixels).logits.argmax(dim=-1)
    np.savez(folder / "data.npz", pixel_values=pixels.numpy(), label=labels.numpy())
    np.savez(folder / "other.npz", pixel_values=pixels.flip(0).numpy())
    return folder


def protect(work: Path, out: Path, **options: Any) -> Any:
    given = {"base": work / "base", "data": work / "data.npz", "settings": SETTINGS, "seed": 3, **options}
    return unmergeable.protect(work / "expert", method="collapse", out=out, **given)


def test_only_blocks_are_trained(work: Path, tmp_path: Path) -> None:
    result = protect(work, tmp_path / "out", generic=work / "other.npz")

    expert, written = (load_file(folder / "model.safetensors") for folder in (work / "expert", tmp_path / "out"))
    assert {name: tensor.dtype for name, tensor in written.items()} == {n: t.dtype for n, t in expert.items()}
    changed = {name for name in expert if not torch.equal(expert[name], written[name])}
    assert changed
    assert all(".layer." in name for name in changed)
    document = result.to_json()
    assert len(document["losses"]) == 6
    assert set(document["accuracies"]) == {"expert", "protected"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_stopped_after_training_it_goes_on_to_the_same_bytes(work: Path, tmp_path: Path) -> None:
    class Stopped(BaseException):
        pass

    def stop(stage: str, done: int, total: int, unit: str) -> None:
        if stage != "collapsing merges":
            raise Stopped

    protect(work, tmp_path / "whole")
    with pytest.raises(Stopped):
        protect(work, tmp_path / "out", progress=stop)
    assert (tmp_path / "out.training" / "trained.safetensors").is_file()
    stages: list[str] = []
    protect(work, tmp_path / "out", progress=lambda stage, *_: stages.append(stage))

    assert "collapsing merges" not in stages
    for name in ("model.safetensors", "unmergeable.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_it_cannot_do_without_is_asked_for(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="collapse trains on labelled data"):
        protect(work, tmp_path / "out", data=None)
    with pytest.raises(UsageError, match="reads no generic"):
        unmergeable.protect(
            work / "expert", base=work / "base", method="gauge", out=tmp_path / "out", generic=work / "other.npz"
        )
    assert protect(work, tmp_path / "out", dry_run=True).is_dry_run
    assert not list(tmp_path.iterdir())
