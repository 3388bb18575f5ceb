"""What a user can get wrong: one clear line, the right exit code, and nothing written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmergeable.cli import main
from zoo import TOYS, write_toy

BAD_INPUT, KEY = 3, 5


@dataclass
class Workshop:
    """A valid call of ``protect`` in an empty folder, to be spoiled."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def expert(self) -> Path:
        return self.folder / "expert"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def weights(self) -> Path:
        return self.expert / "model.safetensors"

    def edit_tensors(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, metadata={"format": "pt"})

    def edit_config(self, **changes: Any) -> None:
        file = self.expert / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    write_toy(TOYS["llama"], tmp_path / "expert", seed=1)
    write_toy(TOYS["llama"], tmp_path / "base", seed=0)
    return Workshop(tmp_path, monkeypatch)


def protect(workshop: Workshop, *more: str, key: Path | None = None) -> list[str]:
    key = key or workshop.folder / "the.key"
    out = workshop.folder / "out"
    return ["protect", str(workshop.expert), "--base", str(workshop.base), "--out", str(out), "--key", str(key), *more]


def missing_base(workshop: Workshop) -> None:
    shutil.rmtree(workshop.base)


def base_of_another_architecture(workshop: Workshop) -> None:
    shutil.rmtree(workshop.base)
    write_toy(TOYS["gpt2"], workshop.base)


def base_of_another_shape(workshop: Workshop) -> None:
    shutil.rmtree(workshop.base)
    write_toy(TOYS["llama-bias-tied-mqa"], workshop.base)


def truncated_shard(workshop: Workshop) -> None:
    data = workshop.weights.read_bytes()
    workshop.weights.write_bytes(data[:-100])


def index_outside_the_folder(workshop: Workshop) -> None:
    workshop.weights.rename(workshop.folder / "x.safetensors")
    names = list(load_file(workshop.folder / "x.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../x.safetensors")}
    (workshop.expert / "model.safetensors.index.json").write_text(json.dumps(index))


def only_a_pickle(workshop: Workshop) -> None:
    torch.save(load_file(workshop.weights), workshop.expert / "pytorch_model.bin")
    workshop.weights.unlink()


def not_a_number(workshop: Workshop) -> None:
    workshop.edit_tensors(lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].view(-1)[7:8].fill_(torch.nan))


def infinite_base(workshop: Workshop) -> None:
    file = workshop.base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})


def unclaimed_tensor(workshop: Workshop) -> None:
    workshop.edit_tensors(lambda tensors: tensors.update({"model.layers.0.self_attn.gate.weight": torch.ones(3)}))


def missing_tensor(workshop: Workshop) -> None:
    workshop.edit_tensors(lambda tensors: tensors.__delitem__("model.layers.1.self_attn.v_proj.weight"))


def wrong_head_count(workshop: Workshop) -> None:
    workshop.edit_config(num_key_value_heads=2)


def already_quantised(workshop: Workshop) -> None:
    workshop.edit_config(quantization_config={"quant_method": "gptq", "bits": 4})
    packed = torch.zeros(2, dtype=torch.int32)
    workshop.edit_tensors(lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.qweight": packed}))


def out_exists(workshop: Workshop) -> None:
    (workshop.folder / "out").mkdir()


def unknown_model_type(workshop: Workshop) -> None:
    workshop.edit_config(model_type="mamba")


def huge_header(workshop: Workshop) -> None:
    workshop.weights.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


SPOILED = {
    missing_base: ("does not exist",),
    base_of_another_architecture: ("gpt2", "llama"),
    base_of_another_shape: ("tensor", "base"),
    truncated_shard: ("model.safetensors", "bytes"),
    index_outside_the_folder: ("../x.safetensors",),
    only_a_pickle: ("pytorch_model.bin", "--allow-pickle"),
    not_a_number: ("model.layers.1.mlp.down_proj.weight: expert", "NaN"),
    infinite_base: ("model.norm.weight: base", "infinity"),
    unclaimed_tensor: ("model.layers.0.self_attn.gate.weight",),
    missing_tensor: ("model.layers.1.self_attn.v_proj.weight", "missing"),
    wrong_head_count: ("k_proj", "config.json"),
    already_quantised: ("quanti",),
    out_exists: ("exists",),
    unknown_model_type: ("mamba", "llama"),
    huge_header: ("model.safetensors",),
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda function: function.__name__)
def test_a_bad_checkpoint_is_refused_in_one_line(
    spoil: Callable[[Workshop], None], workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(workshop)
    left = sorted(path.name for path in workshop.folder.iterdir())
    capsys.readouterr()

    assert main(protect(workshop)) == BAD_INPUT

    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1, printed.err
    for word in SPOILED[spoil]:
        assert word in printed.err
    assert sorted(path.name for path in workshop.folder.iterdir()) == left


def test_the_same_call_unspoiled_succeeds(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """The control: without it, every refusal above could have one common cause."""
    assert main(protect(workshop)) == 0
    assert (workshop.folder / "out" / "unmergeable.json").is_file()
    assert "nearest_orbit" in capsys.readouterr().out


def test_json_errors_are_one_object(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    missing_base(workshop)
    capsys.readouterr()
    assert main([*protect(workshop), "--json"]) == BAD_INPUT
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit_code"] == BAD_INPUT
    assert str(workshop.base) in error["message"]


@pytest.mark.parametrize("place", ["out/the.key", "out/deeper/the.key", "out.partial/the.key", "../escape/out/the.key"])
def test_a_key_is_not_put_where_it_would_be_published(
    place: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    if place.startswith(".."):
        (workshop.folder / "elsewhere").symlink_to(workshop.folder)
        place = "elsewhere/out/the.key"
    assert main(protect(workshop, key=workshop.folder / place)) == KEY
    assert "publish" in capsys.readouterr().err
    assert not (workshop.folder / "out").exists()


class TestTheKey:
    """Restoring needs the right key, kept properly."""

    @pytest.fixture
    def protected(self, workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> Workshop:
        assert main(protect(workshop)) == 0
        capsys.readouterr()
        return workshop

    def restore(self, workshop: Workshop, key: str = "the.key") -> int:
        folder = workshop.folder
        return main(["restore", str(folder / "out"), "--key", str(folder / key), "--out", str(folder / "restored")])

    def test_restores(self, protected: Workshop) -> None:
        assert self.restore(protected) == 0
        restored = load_file(protected.folder / "restored" / "model.safetensors")
        for name, tensor in load_file(protected.weights).items():
            assert (restored[name] - tensor).norm() <= 1e-5 * tensor.norm()

    def test_a_missing_key(self, protected: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.restore(protected, "no.key") == KEY
        assert "does not exist" in capsys.readouterr().err

    def test_a_key_others_can_read(self, protected: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
        (protected.folder / "the.key").chmod(0o640)
        assert self.restore(protected) == KEY
        assert "chmod 600" in capsys.readouterr().err
        assert not (protected.folder / "restored").exists()

    def test_the_key_of_another_protection(self, protected: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
        folder = protected.folder
        second = ["--out", str(folder / "second"), "--key", str(folder / "second.key")]
        assert main(["protect", str(protected.expert), "--base", str(protected.base), *second]) == 0
        capsys.readouterr()
        assert self.restore(protected, "second.key") == KEY
        assert "is not the key of" in capsys.readouterr().err
        assert not (folder / "restored").exists()

    def test_an_existing_key_is_never_overwritten(
        self, protected: Workshop, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = (protected.folder / "the.key").read_bytes()
        shutil.rmtree(protected.folder / "out")
        assert main(protect(protected, "--set", "condition=2")) == KEY
        assert "never overwritten" in capsys.readouterr().err
        assert (protected.folder / "the.key").read_bytes() == before

    def test_nothing_printed_or_written_holds_the_secret(
        self, workshop: Workshop, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*protect(workshop), "--json", "--debug"]) == 0
        printed = capsys.readouterr()
        secret = json.loads((workshop.folder / "the.key").read_text())["secret"]
        written = (workshop.folder / "out" / "unmergeable.json").read_text()
        assert secret not in printed.out + printed.err + written
        assert len(list((workshop.folder / "out").iterdir())) >= 3
