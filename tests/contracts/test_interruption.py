"""Killed, out of disk: no OUT that is not whole, and the same command again finishes the work."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmergeable.checkpoint import partial
from unmergeable.checkpoint.manifest import check_files
from unmergeable.cli import main

LAYERS = 6


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 22 MB in three shards: large enough to be killed in the middle."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=688, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("interruption") / "expert"
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10MB")
    return folder


def arguments(expert: Path, folder: Path, out: str = "out") -> list[str]:
    key = ["--key", str(folder / "the.key"), "--seed", "5", "--quiet"]
    return ["protect", str(expert), "--base", str(expert), "--out", str(folder / out), *key]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "unmergeable.json"}


def test_kill_at_random_points_then_rerun(expert: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unmergeable", *arguments(expert, tmp_path)]
    began = time.monotonic()
    whole = tmp_path / "whole"
    whole.mkdir()
    subprocess.run([sys.executable, "-m", "unmergeable", *arguments(expert, whole)], check=True, capture_output=True)
    duration = time.monotonic() - began

    moments = random.Random(1)
    killed = 0
    for _ in range(3):  # tests/checkpoint/test_rewrite.py kills before each call that changes the disk
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=moments.uniform(0.3, 1.0) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            if (tmp_path / "out").exists():  # killed after the rename, on its way out: then OUT is whole
                assert check_files(tmp_path / "out") == ()
                break
        else:
            assert process.returncode == 0
            break
    assert killed, "no run was killed: the test would show nothing"
    if not (tmp_path / "out").exists():
        subprocess.run(command, check=True, capture_output=True)
    assert not (tmp_path / "out.partial").exists()
    assert files_of(tmp_path / "out") == files_of(whole / "out")
    assert (
        main(["restore", str(tmp_path / "out"), "--key", str(tmp_path / "the.key"), "--out", str(tmp_path / "r")]) == 0
    )


def test_the_same_command_on_what_it_had_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after OUT had its name, before the journal beside it was gone: nothing is left to do but to tidy up."""
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "toy"}')
        save_file({"weight": torch.full((4, 4), float(number))}, tmp_path / name / "model.safetensors")
    models = ["--expert", str(tmp_path / "a"), "--expert", str(tmp_path / "b")]
    command = ["merge", "--method", "linear", *models, "--out", str(tmp_path / "out"), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(partial, "_remove_partial", lambda folder: None)
        assert main(command) == 0
    assert (tmp_path / "out.partial").exists()
    whole = files_of(tmp_path / "out")
    capsys.readouterr()

    assert main([*command, "--set", "normalize=false"]) == 3, "other work is not taken for this one"
    assert "exists" in capsys.readouterr().err
    assert main(command) == 0
    assert "is complete" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]
    assert main(command) == 3


def test_a_full_disk(expert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=15m", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root; the disk is filled by a size limit in tests/checkpoint instead")
    try:
        assert main(arguments(expert, small)) == 1
        assert "disk" in capsys.readouterr().err
        assert not (small / "out").exists()
        # Room for less than it takes, found out only while writing: the check up front is told there is plenty.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
            assert main(arguments(expert, small)) == 1
        printed = capsys.readouterr().err.strip()
        assert len([line for line in printed.splitlines() if "seed" not in line]) == 1, printed
        assert not (small / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=200m", str(small)], check=True)
        assert main(arguments(expert, small)) == 0
        assert set(load_file(next((small / "out").glob("*00001-of*")))) == set(
            load_file(next(expert.glob("*00001-of*")))
        )
    finally:
        subprocess.run(["umount", str(small)], check=True)
