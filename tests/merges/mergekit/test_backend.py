"""mergekit in a process of its own: its result is taken only if nothing is lost."""

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merges.small_models import make_models, write_checkpoint
from unmergeable.checkpoint.manifest import check_files, read_manifest
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, Mismatch, UnmergeableError, UsageError
from unmergeable.merges import Linear, TaskArithmetic, merge_state_dicts
from unmergeable.merges.mergekit.backend import find_command, merge_with_mergekit
from unmergeable.merges.mergekit.documents import with_donor

STAND_IN = """#!{python}
import json, shutil, sys
from pathlib import Path
config, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
source = Path(config["models"][0]["model"])
{body}
"""

COPY = """
for path in source.iterdir():
    shutil.copy(path, out)
(out / "README.md").write_text("made from " + str(source))
(out / "mergekit_config.yml").write_text(str(config))
"""
LOSE = """
from safetensors.numpy import load_file, save_file
shutil.copy(source / "config.json", out)
tensors = load_file(source / "model.safetensors")
{change}
save_file(tensors, out / "model.safetensors")
"""


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, TensorSource]:
    base, (expert,) = make_models(1)
    folders = [write_checkpoint(tmp_path / name, state) for name, state in (("base", base), ("expert", expert))]
    return dict(zip(("base", "model 1"), map(open_checkpoint, folders), strict=True))


def stand_in(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that answers to mergekit's name."""
    command = folder / "bin" / "mergekit-yaml"
    command.parent.mkdir()
    command.write_text(STAND_IN.format(python=sys.executable, body=body))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("unmergeable.merges.mergekit.backend.find_command", lambda: str(command))


def document(sources: dict[str, TensorSource]) -> dict[str, object]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(sources["model 1"].folder)}],
        "parameters": {"weight": 1},
    }


def test_a_whole_result_appears_with_a_manifest(
    tmp_path: Path, sources: dict[str, TensorSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, COPY, monkeypatch)
    manifest = merge_with_mergekit(document(sources), sources, tmp_path / "out")
    assert read_manifest(tmp_path / "out") == manifest
    assert check_files(tmp_path / "out") == ()
    assert manifest.details["recipe"]["merge"] == "linear"
    assert set(manifest.inputs) == {"base", "model 1"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "tokenizer.json", "model.safetensors", "unmergeable.json"
    }  # fmt: skip
    assert not (tmp_path / "out.partial").exists()


LOSSES = [
    ("del tensors['layers.0.bias']", "tensor 'layers.0.bias' is in"),
    ("tensors['more'] = tensors['scale'].copy()", "tensor 'more' is in"),
    ("tensors['scale'] = tensors['scale'].reshape(1)", "tensor 'scale'"),
    ("tensors['scale'] = tensors['scale'].astype('float16')", "'scale' was to be F32 but is F16"),
]


@pytest.mark.parametrize(("change", "message"), LOSSES, ids=[change for change, _ in LOSSES])
def test_a_loss_is_refused(
    change: str, message: str, tmp_path: Path, sources: dict[str, TensorSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, LOSE.format(change=change), monkeypatch)
    with pytest.raises(Mismatch, match=message):
        merge_with_mergekit(document(sources), sources, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


RENAMED = "tensors = {'model.' + name: tensor for name, tensor in tensors.items()}"


def test_other_prefixes_of_names_are_no_loss(
    tmp_path: Path, sources: dict[str, TensorSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit writes the names of its own table."""
    stand_in(tmp_path, LOSE.format(change=RENAMED), monkeypatch)
    merge_with_mergekit(document(sources), sources, tmp_path / "out")
    assert "model.layers.0.bias" in Checkpoint.open(tmp_path / "out").names


def test_a_loss_under_other_prefixes_is_refused(
    tmp_path: Path, sources: dict[str, TensorSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, LOSE.format(change=f"{RENAMED}; del tensors['model.layers.0.bias']"), monkeypatch)
    with pytest.raises(Mismatch, match=r"'layers.0.bias' is in the models but not in"):
        merge_with_mergekit(document(sources), sources, tmp_path / "out")


def test_the_first_model_gives_the_configuration() -> None:
    """Else any of them does, another one in another run."""
    models = [{"model": name, "parameters": {"weight": 1.0}} for name in ("b", "a")]
    plain: dict[str, Any] = {"merge_method": "linear", "models": models}
    assert with_donor(plain) == {**plain, "base_model": "b"}
    named = {**plain, "base_model": "a"}
    assert with_donor(named) == named
    added = {**plain, "merge_method": "ties", "base_model": "base"}
    assert with_donor(added) == added


def test_another_dtype_is_taken_if_it_was_asked_for(
    tmp_path: Path, sources: dict[str, TensorSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    change = "tensors = {n: t.astype('float16') if t.dtype.kind == 'f' else t for n, t in tensors.items()}"
    stand_in(tmp_path, LOSE.format(change=change), monkeypatch)
    merge_with_mergekit(document(sources), sources, tmp_path / "out", out_dtype=torch.float16)
    with pytest.raises(Mismatch, match="is F16"):
        merge_with_mergekit(document(sources), sources, tmp_path / "other")


def test_a_failure_is_told_in_one_line(
    tmp_path: Path, sources: dict[str, TensorSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "print('a trace', file=sys.stderr)\nsys.exit('no such method')", monkeypatch)
    with pytest.raises(UnmergeableError, match="mergekit-yaml failed with exit code 1: no such method") as caught:
        merge_with_mergekit(document(sources), sources, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_an_absent_mergekit_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"mergekit-yaml is not installed; run: pip install 'unmergeable\[mergekit\]'"):
        find_command()
    (tmp_path / "mergekit-yaml").touch(mode=0o755)
    assert find_command() == str(tmp_path / "mergekit-yaml")


def test_refuses_an_output_that_cannot_be(
    tmp_path: Path, sources: dict[str, TensorSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, COPY, monkeypatch)
    with pytest.raises(BadInput, match="exists"):
        merge_with_mergekit(document(sources), sources, tmp_path / "base")
    with pytest.raises(BadInput, match="parent folder"):
        merge_with_mergekit(document(sources), sources, tmp_path / "no" / "out")


def write_llamas(folder: Path, count: int, *, attention_bias: bool) -> list[Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=attention_bias,
    )
    folders = []
    for number in range(count):
        torch.manual_seed(number)
        network = LlamaForCausalLM(config).to(torch.bfloat16)
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        network.save_pretrained(folder / f"llama{number}")
        folders.append(folder / f"llama{number}")
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_the_real_mergekit_merges_as_we_do(tmp_path: Path, method: str) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    folders = write_llamas(tmp_path, 3, attention_bias=False)
    states = [load_file(folder / "model.safetensors") for folder in folders]
    document = {
        "merge_method": method,
        "models": [{"model": str(folder), "parameters": {"weight": 0.4}} for folder in folders[1:]],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method != "linear":
        document["base_model"] = str(folders[0])
    inputs = {f"model {number}": open_checkpoint(folder) for number, folder in enumerate(folders)}
    merge_with_mergekit(document, inputs, tmp_path / "out")
    theirs = {n: t for path in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(path).items()}
    ours = merge_state_dicts(
        states[0], states[1:], method=Linear() if method == "linear" else TaskArithmetic(), coefficients=[0.4, 0.4]
    )
    for name, tensor in ours.items():
        step = torch.finfo(torch.bfloat16).eps * torch.maximum(tensor.abs(), theirs[name].abs()).float()
        assert bool(((tensor.float() - theirs[name].float()).abs() <= step + 1e-6).all()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.slow
def test_the_real_mergekit_loses_the_biases_of_a_llama(tmp_path: Path) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    folders = write_llamas(tmp_path, 2, attention_bias=True)
    document = {
        "merge_method": "linear",
        "models": [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders],
    }
    inputs = {f"model {number}": open_checkpoint(folder) for number, folder in enumerate(folders)}
    with pytest.raises(Mismatch, match=r"self_attn.\w_proj.bias' is in .* but not in"):
        merge_with_mergekit(document, inputs, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
