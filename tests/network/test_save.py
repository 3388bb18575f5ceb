from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from unmergeable.network.load import load_network
from unmergeable.network.save import write_network


def test_loading_and_writing_changes_nothing(
    folder: Path, tmp_path: Path, tensors: Mapping[str, Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy"

    write_network(load_network(folder), out, config_from=folder)

    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()  # names on disk, although the network has others in memory
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert capfd.readouterr() == ("", "")


def test_the_names_in_memory_are_others(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    in_memory = {name for name, _ in load_network(folder).named_parameters()}

    assert in_memory != tensors.keys()
