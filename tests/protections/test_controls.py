"""Controls do what they say and no more, and are not to be had as protections."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unmergeable
from unmergeable.errors import UsageError
from unmergeable.ops.protection import write_control
from unmergeable.protections import CONTROLS, PROTECTIONS
from unmergeable.protections.controls import Noise, Scale
from unmergeable.randomness import Stream
from unmergeable.settings import configure
from zoo import TOYS, write_toy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_as_large_as_asked_for(dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(Stream.from_seed(0).normal(300, 100)).to(dtype)
    found = Noise(0.1).edit(tensor, tensor, Stream.from_seed(1))
    assert found.dtype == dtype
    size = float((found - tensor).double().norm() / tensor.double().norm())
    assert size == pytest.approx(0.1, rel=3 / (2 * tensor.numel()) ** 0.5 + 4 * torch.finfo(dtype).eps)
    again, other = (Noise(0.1).edit(tensor, tensor, Stream.from_seed(seed)) for seed in (1, 2))
    assert torch.equal(found, again)
    assert not torch.equal(found, other)


def test_scale_shortens_the_task_vector() -> None:
    base, expert = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    assert Scale(0.5).edit(expert, base, Stream.from_seed(0)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(("control", "settings"), [("noise", {"size": -1}), ("scale", {"factor": 2})])
def test_settings_out_of_range(control: str, settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"^{control}: "):
        configure(CONTROLS[control], settings)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_is_written_but_never_as_a_protection(name: str, tmp_path: Path) -> None:
    base = write_toy(TOYS["llama"], tmp_path / "base", seed=0)
    expert = write_toy(TOYS["llama"], tmp_path / "expert", seed=1)
    write_control(expert, base=base, out=tmp_path / "out", method=name)
    (before, after) = (load_file(folder / "model.safetensors") for folder in (expert, tmp_path / "out"))
    assert all(torch.equal(after[key], before[key]) for key in before) == (name == "identity")

    assert name not in PROTECTIONS
    with pytest.raises(UsageError, match="is a control and protects nothing"):
        unmergeable.protect(expert, base=base, method=name, out=tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(UsageError, match="no control is called"):
        write_control(expert, base=base, out=tmp_path / "no", method="mergelock")
