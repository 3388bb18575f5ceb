"""Outputs of whole networks: what can be run is run, what cannot is said, and the bound is what roundings do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmergeable import memory
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import CheckpointError
from unmergeable.network import logits
from unmergeable.network.logits import LogitGap, logit_gap
from unmergeable.optional import quiet

TEXT = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


def saved(network: Any, folder: Path, **config: Any) -> Path:
    with quiet(transformers):
        network.save_pretrained(folder)
    path = folder / "config.json"
    changed = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in changed.items() if value != "leave out"}))
    return folder


def copied(folder: Path, out: Path, change: Callable[[Tensor], Tensor] = torch.clone) -> Path:
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({name: change(tensor) for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def gap_of(first: Path, second: Path, **options: Any) -> LogitGap:
    return logit_gap(Checkpoint.open(first), Checkpoint.open(second), 1.0, **options)


def backbone() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", out_features=["stage1"], image_size=16
    )
    return transformers.ResNetBackbone(config)


RUN: dict[str, Callable[[], Any]] = {
    "a classifier without a token for padding": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**TEXT)
    ),
    "a choice among several texts": lambda: transformers.BertForMultipleChoice(transformers.BertConfig(**TEXT)),
    "feature maps": backbone,
}


@pytest.mark.parametrize("build", RUN.values(), ids=RUN)
def test_it_is_run_as_it_wants_to_be(build: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = saved(build(), tmp_path / "network")
    assert gap_of(folder, copied(folder, tmp_path / "same")).gap == 0
    other = copied(folder, tmp_path / "other", lambda tensor: tensor * 1.1 if tensor.is_floating_point() else tensor)
    assert gap_of(folder, other).is_beyond_bound, "the control"


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no class": ({"architectures": "leave out"}, "names the network class None"),
    "null": ({"architectures": None}, "names the network class None"),
    "a class of its own": ({"architectures": ["MineForCausalLM"]}, "names the network class 'MineForCausalLM'"),
}


@pytest.mark.parametrize(("config", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_what_cannot_be_run_is_not_measured_and_says_why(
    config: Mapping[str, Any], reason: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    folder = saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)), tmp_path / "network", **config)
    gap = gap_of(folder, folder)
    assert gap.gap is None
    assert not gap.is_beyond_bound
    assert reason in gap.reason
    assert gap.describe().startswith("not measured: the network could not be run (")
    probe = tmp_path / "probe.jsonl"
    probe.write_text('{"input_ids": [1, 2]}\n')
    with pytest.raises(Exception, match="network class"):
        gap_of(folder, folder, probe=probe)  # who gives inputs wants them run


def test_hidden_states_before_a_stored_head_are_not_compared(tmp_path: Path) -> None:
    """Their basis is the network's own affair; the class that config.json names would show them."""
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    folder = saved(network, tmp_path / "network", architectures=["LlamaModel"])
    gap = gap_of(folder, folder)
    assert gap.gap is None
    assert gap.reason == "config.json names LlamaModel, a network without the output head that the file has"
    whole = saved(network.model, tmp_path / "bare")
    assert gap_of(whole, whole).gap == 0, "the control: a file without a head"


def test_a_result_that_does_not_run_is_refused_where_the_original_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)), tmp_path / "network")
    broken = copied(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights of LlamaForCausalLM are missing, lm_head\.weight"):
        gap_of(folder, broken)


def test_beyond_the_usual_bound_what_roundings_do_is_measured(tmp_path: Path) -> None:
    """A T5 with large weights divides its scores by nothing, and so roundings grow. Roundings of its weights by half a
    unit move it further than the usual bound allows, and are equal by the measured one; 100 times as much is not."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=31, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    network = transformers.T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=1.5)
    folder = saved(network, tmp_path / "network")
    generator = torch.Generator().manual_seed(1)

    def moved(times: float) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor * (1 + times * 2.0**-24 * (2 * torch.rand(tensor.shape, generator=generator) - 1))

    near = gap_of(folder, copied(folder, tmp_path / "near", moved(2)))
    assert near.gap is not None
    assert near.gap > logits.NETWORK_FACTOR * 2.0**-24, "the reason for the test: the usual bound would refuse it"
    assert not near.is_beyond_bound
    far = gap_of(folder, copied(folder, tmp_path / "far", moved(1000)))
    assert far.is_beyond_bound, "the control"


def test_available_memory_is_what_the_system_calls_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what it calls free: the caches of a machine that has read files for a while fill nearly all of it."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  8000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    assert memory.available_memory() == 8000 * 1024
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    assert memory.available_memory() > 0
