from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from unmergeable.errors import BadInput, CheckpointError, UsageError
from unmergeable.network.load import load_network, load_tokenizer
from unmergeable.optional import quiet


def rewrite_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_every_weight_on_disk_is_in_the_network(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    network = load_network(folder)

    assert type(network) is transformers.Dinov2Model
    assert not network.training
    # transformers has names of its own for some of them; no value may be lost or drawn at random.
    in_memory = {tuple(parameter.flatten().tolist()) for parameter in network.parameters()}
    assert in_memory == {tuple(tensor.flatten().tolist()) for tensor in tensors.values()}


def test_casts_to_the_dtype_asked_for(folder: Path) -> None:
    network = load_network(folder, dtype=torch.bfloat16)

    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_loads_in_silence_and_restores_what_it_silenced(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()

    load_network(folder)

    assert capfd.readouterr() == ("", "")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_transformers_is_not_silent_by_itself(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers.Dinov2Model.from_pretrained(folder)

    assert capfd.readouterr().err


def test_quiet_ends_with_its_block() -> None:
    with quiet(transformers):
        warnings.warn("not shown", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="shown"):
        warnings.warn("shown", UserWarning, stacklevel=1)


def test_quiet_ends_with_an_error() -> None:
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()

    with pytest.raises(RuntimeError), quiet(transformers):
        raise RuntimeError

    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def test_refuses_to_invent_a_missing_weight(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    lost = "encoder.layer.1.mlp.fc2.weight"
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != lost},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )

    with pytest.raises(CheckpointError, match=r"1 weights .* encoder\.layer\.1\.mlp\.fc2\.weight"):
        load_network(folder)


def test_refuses_weights_of_another_shape(folder: Path) -> None:
    rewrite_config(folder, mlp_ratio=4)

    with pytest.raises(CheckpointError, match="Dinov2Model"):
        load_network(folder)


def test_refuses_a_truncated_file(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    with pytest.raises(CheckpointError, match="does not load"):
        load_network(folder)


def test_refuses_a_pickle(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(dict(tensors), folder / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match="does not load"):
        load_network(folder)


@pytest.mark.parametrize("changes", [{"architectures": ["NoSuchModel"]}, {"architectures": None}])
def test_names_a_class_it_does_not_know(folder: Path, changes: Mapping[str, object]) -> None:
    rewrite_config(folder, **changes)

    with pytest.raises(BadInput, match="unknown to transformers"):
        load_network(folder)


def test_never_runs_code_of_the_folder(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    (folder / "modeling_trap.py").write_text(f"open({str(trap)!r}, 'w')\n")
    rewrite_config(folder, auto_map={"AutoModel": "modeling_trap.Trap"})

    load_network(folder)

    assert not trap.exists()


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_says_what_is_wrong_with_the_config(folder: Path, text: str | None) -> None:
    path = folder / "config.json"
    path.unlink() if text is None else path.write_text(text)

    with pytest.raises(BadInput, match=r"config\.json"):
        load_network(folder)


def test_says_how_to_install_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(UsageError, match=r"pip install 'unmergeable\[hf\]'"):
        load_network(folder)
    with pytest.raises(UsageError, match=r"pip install 'unmergeable\[hf\]'"):
        load_tokenizer(folder)


def test_a_folder_without_tokenizer(folder: Path) -> None:
    with pytest.raises(BadInput, match="no usable tokenizer"):
        load_tokenizer(folder)
