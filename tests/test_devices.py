"""Where networks compute, with torch's word on GPUs replaced: there need not be one here."""

from __future__ import annotations

import os

import pytest
import torch

from unmergeable.devices import VISIBLE, count_gpus, network_device, see_one_gpu


def pretend(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda"), (8, "cuda")])
def test_a_gpu_is_used_where_there_is_one(gpus: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpus)
    assert network_device().type == device
    assert count_gpus() == gpus


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, ["0", "1", "0"]),
        ("", ["0", "1", "0"]),
        ("2,5", ["2", "5", "2"]),
        ("GPU-a, GPU-b", ["GPU-a", "GPU-b", "GPU-a"]),
    ],
)
def test_each_process_sees_one_of_those_that_its_parent_saw(
    visible: str | None, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for number in range(3):
        if visible is None:
            monkeypatch.delenv(VISIBLE, raising=False)
        else:
            monkeypatch.setenv(VISIBLE, visible)
        see_one_gpu(number, 2)
        found.append(os.environ[VISIBLE])
    assert found == seen


def test_without_gpus_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "")
    see_one_gpu(1, 0)
    assert os.environ[VISIBLE] == ""
