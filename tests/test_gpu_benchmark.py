"""The comparison of a GPU with the processor, where the second device is the processor again."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmarks import gpu

from unmergeable.devices import VISIBLE
from unmergeable.merges import MERGES, merge_method

SMALL = gpu.SIZES["small"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("gpu")
    for device in gpu.DEVICES:
        (found / f"out-{device}").mkdir()
    return found


def test_every_merge_without_data_is_made_and_compared(folder: Path) -> None:
    found = {
        device: {
            "merges": gpu.merges(folder, folder / f"out-{device}", SMALL),
            "training": {"seconds": {"collapse": seconds}, "accuracies": {"expert": 0.5}},
            "audit": {"seconds": {"audit": seconds}, "scores": {"a": 0.25, "b": None}},
        }
        for device, seconds in zip(gpu.DEVICES, (6.0, 2.0), strict=True)
    }
    without_data = {name for name in MERGES if not merge_method(name).needs_data}
    assert set(found["gpu"]["merges"]["seconds"]) == without_data
    compared = gpu.compared(found, folder)
    assert compared["processor_over_gpu"]["audit"] == {"audit": 3.0}
    assert compared["largest_relative_difference_of_merges"] == dict.fromkeys(without_data, 0.0)
    assert compared["largest_difference_of_scores"] == compared["largest_difference_of_accuracies"] == 0

    # The control: another number in one of the results is found.
    with np.load(folder / "out-gpu" / "merges.npz") as file:
        changed = {name: file[name].copy() for name in file}
    name = next(name for name in changed if name.startswith("ties."))
    changed[name][7] += 0.5 * np.abs(changed[name]).max()
    np.savez(folder / "out-gpu" / "merges.npz", **changed)
    apart = gpu.compared(found, folder)["largest_relative_difference_of_merges"]
    assert apart.pop("ties") == pytest.approx(0.5, rel=0.5)
    assert set(apart.values()) == {0.0}


def test_what_only_one_device_has_is_no_agreement() -> None:
    assert gpu.largest({"a": 0.5, "b": None}, {"a": 0.25, "b": None}) == 0.25
    assert gpu.largest({"a": 0.5}, {"a": None}) == math.inf
    assert gpu.largest({"a": 0.5}, {}) == math.inf


@pytest.mark.parametrize(("device", "visible"), [("processor", ""), ("gpu", "3")])
def test_the_processor_sees_no_gpu(device: str, visible: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def started(command: list[str], *, env: dict[str, str], **_: object) -> SimpleNamespace:
        seen.update(command=command, visible=env[VISIBLE])
        return SimpleNamespace(returncode=0, stdout='{"seconds": {}}\n')

    monkeypatch.setenv(VISIBLE, "3")
    monkeypatch.setattr(gpu.subprocess, "run", started)
    assert gpu.run("merges", device, tmp_path, "small") == {"seconds": {}}
    assert seen["visible"] == visible
    assert seen["command"][0] == sys.executable
    assert seen["command"][-1] == device


@pytest.mark.slow
def test_training_and_audit_run(folder: Path) -> None:
    gpu.build(folder, SMALL)
    trained = gpu.training(folder, folder / "out-processor", SMALL)
    assert trained["accuracies"]["expert"] == 1
    audited = gpu.audit(folder, folder / "out-processor", SMALL)
    assert "mergelock, None" in audited["scores"]
