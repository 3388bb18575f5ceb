"""Which folders are checkpoints, and what is said about those that are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmergeable.checkpoint.index import TensorSpec, read_index
from unmergeable.checkpoint.plan import lay_out, output_like
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import CheckpointError

WriteFolder = Callable[..., Path]
WEIGHT = torch.ones(2, 2)


def test_an_index_of_two_shards(two_shards: Path) -> None:
    index = read_index(two_shards)

    assert list(index.shards) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    # Data order inside a shard: float32 before bfloat16, then by name, as safetensors lays them out.
    assert list(index.entries)[:3] == ["empty", "w00.weight", "w01.weight"]
    assert index.entries["w00.weight"].spec == TensorSpec("BF16", (40, 30))
    assert list(index.side_files) == ["tokenizer.json"]
    assert [item.name for item in index.left_out] == ["pytorch_model.bin"]
    assert index.weights_index_name == "model.safetensors.index.json"
    assert index.nbytes == 9 * 2400 + 4
    assert index.config["model_type"] == "toy"


def test_reading_an_index_loads_no_torch(two_shards: Path) -> None:
    script = f"""
import sys
from unmergeable.checkpoint.index import read_index
assert len(read_index({str(two_shards)!r}).entries) == 11
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_digest_notices_every_change_of_files(two_shards: Path) -> None:
    digests = {read_index(two_shards).headers_digest}
    assert read_index(two_shards).headers_digest in digests

    (two_shards / "config.json").write_text('{"model_type": "other"}')
    digests.add(read_index(two_shards).headers_digest)
    os.utime(two_shards / "model-00001-of-00002.safetensors", ns=(0, 1))
    digests.add(read_index(two_shards).headers_digest)
    assert len(digests) == 3


ACCEPTED = {
    "diffusers component": ("diffusion_pytorch_model.safetensors", {"_class_name": "UNet2DConditionModel"}),
    "single variant": ("model.fp16.safetensors", {}),
    "diffusers variant": ("diffusion_pytorch_model.bf16.safetensors", {"_class_name": "AutoencoderKL"}),
}


@pytest.mark.parametrize(("name", "config"), ACCEPTED.values(), ids=ACCEPTED)
def test_other_file_names(name: str, config: dict[str, Any], tmp_path: Path, single: WriteFolder) -> None:
    index = read_index(single(tmp_path, {"a.weight": WEIGHT}, config, name=name))
    assert list(index.shards) == [name]


def test_sharded_variant(tmp_path: Path, sharded: WriteFolder) -> None:
    shards = {"model.fp16-00001-of-00001.safetensors": {"a.weight": WEIGHT}}
    index = read_index(sharded(tmp_path, shards, index="model.safetensors.index.fp16.json"))
    assert index.weights_index_name == "model.safetensors.index.fp16.json"


def test_the_plain_file_wins_over_a_variant(tmp_path: Path, single: WriteFolder) -> None:
    folder = single(tmp_path, {"a.weight": WEIGHT})
    save_file({"a.weight": WEIGHT.half()}, folder / "model.fp16.safetensors")
    index = read_index(folder)
    assert list(index.shards) == ["model.safetensors"]
    assert [item.name for item in index.left_out] == ["model.fp16.safetensors"]


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shard_named(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        change_index(folder, lambda content: content["weight_map"].update({"w00.weight": name}))

    return spoil


def absent_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def config_is_torn(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def missing_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def both_single_and_index(folder: Path) -> None:
    save_file({"a": WEIGHT}, folder / "model.safetensors")


def index_without_map(folder: Path) -> None:
    change_index(folder, lambda content: content.pop("weight_map"))


def index_lists_too_much(folder: Path) -> None:
    change_index(folder, lambda content: content["weight_map"].update(ghost="model-00001-of-00002.safetensors"))


def index_lists_too_little(folder: Path) -> None:
    change_index(folder, lambda content: content["weight_map"].pop("scale"))


def index_swaps_a_shard(folder: Path) -> None:
    change_index(folder, lambda content: content["weight_map"].update(scale="model-00001-of-00002.safetensors"))


DISAGREEING = {
    "lists too little": index_lists_too_little,
    "places a tensor elsewhere": index_swaps_a_shard,
    "promises masks": lambda folder: change_index(
        folder, lambda content: content["weight_map"].update({"h.0.attn.bias": "model-00001-of-00002.safetensors"})
    ),
    "no metadata": lambda folder: change_index(folder, lambda content: content.pop("metadata")),
}


@pytest.mark.parametrize("spoil", DISAGREEING.values(), ids=DISAGREEING)
def test_files_are_believed_where_their_index_is_careless(spoil: Callable[[Path], None], two_shards: Path) -> None:
    """Loaders read every tensor of every file that it names; what is written gets an index that is right."""
    before = read_index(two_shards)
    spoil(two_shards)
    source = Checkpoint.open(two_shards)
    assert source.index.entries == before.entries
    small = dict(lay_out(source, output_like(source, {}), None).small_files)
    written = json.loads(small["model.safetensors.index.json"])
    assert written["weight_map"] == {name: entry.shard for name, entry in before.entries.items()}
    assert written["metadata"]["total_size"] == before.nbytes


def test_a_head_that_an_index_promises_is_missed_only_where_it_is_not_tied(two_shards: Path) -> None:
    head = {"lm_head.weight": "model-00001-of-00002.safetensors"}
    change_index(two_shards, lambda content: content["weight_map"].update(head))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' .* no file holds it"):
        read_index(two_shards)
    (two_shards / "config.json").write_text('{"tie_word_embeddings": true}')
    assert "lm_head.weight" not in read_index(two_shards).entries


def tensor_in_two_shards(folder: Path) -> None:
    save_file({"scale": WEIGHT, "w00.weight": 2 * WEIGHT}, folder / "model-00002-of-00002.safetensors")


def shard_is_a_link_outside(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to(folder.parent / "elsewhere.safetensors")


def truncated(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def pipeline(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text("{}")
    save_file({"a": WEIGHT}, folder / "unet" / "diffusion_pytorch_model.safetensors")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def only_pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def only_gguf(folder: Path) -> None:
    only_pickle(folder)
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.Q4.gguf").touch()


def no_weights(folder: Path) -> None:
    only_pickle(folder)
    (folder / "pytorch_model.bin").unlink()


def two_variants(folder: Path) -> None:
    only_pickle(folder)
    for variant in ("fp16", "bf16"):
        save_file({"a": WEIGHT}, folder / f"model.{variant}.safetensors")


def say_quantised(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def quantised_and_says_so(folder: Path) -> None:
    say_quantised(folder, {"quantization_config": {"quant_method": "gptq"}})
    shutil.move(folder / "model-00001-of-00002.safetensors", folder / "moved")
    tensors = load_file(folder / "moved") | {"w00.qweight": torch.zeros(2, dtype=torch.int32)}
    save_file(tensors, folder / "model-00001-of-00002.safetensors")


def quantised_text_part_as_it_runs(folder: Path) -> None:
    say_quantised(folder, {"text_config": {"quantization_config": {"quant_method": "bitnet"}}})


def only_vectors_of_a_quantised_model(folder: Path) -> None:
    only_pickle(folder)
    say_quantised(folder, {"text_config": {"quantization_config": {"quant_method": "awq"}}})
    save_file({"norm.weight": torch.ones(3)}, folder / "model.safetensors")


def saved_empty(folder: Path) -> None:
    only_pickle(folder)
    save_file({"a.weight": torch.empty(0), "b.weight": WEIGHT}, folder / "model.safetensors")


def only_folders(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name in names:
        (folder / name).mkdir(parents=True)


def snapshot_folder_meant(folder: Path) -> None:
    only_folders(folder, "snapshots/abc", "blobs", "refs")


def training_run(folder: Path) -> None:
    only_folders(folder, "checkpoint-1000", "checkpoint-500")


def deepspeed_parts(folder: Path) -> None:
    only_folders(folder, "global_step10")
    (folder / "zero_to_fp32.py").touch()


def pipeline_in_one_file(folder: Path) -> None:
    only_folders(folder)
    save_file({"model.diffusion_model.weight": WEIGHT}, folder / "sd.safetensors")


def repeated_key(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": 1, "a": 2}')


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "shard above": (shard_named("../x.safetensors"), r"'\.\./x\.safetensors'.*do not trust"),
    "shard absolute": (shard_named("/etc/x.safetensors"), "do not trust"),
    "shard in a folder": (shard_named("a/x.safetensors"), "do not trust"),
    "shard hidden": (shard_named(".x.safetensors"), "do not trust"),
    "shard of another kind": (shard_named("config.json"), "do not trust"),
    "shard with a null byte": (shard_named("x\0.safetensors"), "do not trust"),
    "shard with a line break": (shard_named("x.safetensors\n"), "do not trust"),
    **{
        function.__name__: (function, message)
        for function, message in (
            (absent_config, "no config.json: copy that of the model"),
            (config_is_a_list, "not a JSON object"),
            (config_is_torn, "config.json .* not valid JSON"),
            (repeated_key, "'a' appears twice"),
            (missing_shard, "model-00002-of-00002.safetensors is missing"),
            (missing_index, "no index that names it"),
            (both_single_and_index, "holds both"),
            (index_without_map, "has no weight_map"),
            (index_lists_too_much, "promises tensor 'ghost' .* no file holds it"),
            (tensor_in_two_shards, "'w00.weight' is in both"),
            (shard_is_a_link_outside, "link that leaves the folder"),
            (truncated, "truncated shard: model-00002-of-00002.safetensors"),
            (pipeline, "pipeline .*unet"),
            (adapter, "is an adapter.*org/base"),
            (only_pickle, r"pytorch_model.bin.*convert them to safetensors: python -c"),
            (only_gguf, "GGUF.*convert"),
            (no_weights, "has no weights"),
            (two_variants, "several variants"),
            (quantised_and_says_so, "already quantised by 'gptq' .*qweight"),
            (quantised_text_part_as_it_runs, "quantised as it runs .text_config.quantization_config: 'bitnet'"),
            (only_vectors_of_a_quantised_model, "already quantised by 'awq'"),
            (saved_empty, r"1 of 2 tensors are empty, a.weight among them.*zero_to_fp32"),
            (snapshot_folder_meant, r"hub's cache: pass its snapshot .*source/snapshots/abc"),
            (training_run, r"2 checkpoints of a training run .* pass .*checkpoint-1000\."),
            (deepspeed_parts, "DeepSpeed.*zero_to_fp32.py"),
            (pipeline_in_one_file, r"sd\.safetensors and no config.json.*from_single_file"),
        )
    },
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    spoil: Callable[[Path], None], message: str, two_shards: Path
) -> None:
    read_index(two_shards)  # the control: unspoiled, it is accepted

    spoil(two_shards)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_index(two_shards)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_index(tmp_path / "absent")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file: pass the folder"):
        read_index(tmp_path / "model.safetensors")


QUANTISED = {
    "GPTQ": ("model.layers.0.q_proj.qweight", torch.zeros(2, 2, dtype=torch.int32)),
    "bitsandbytes 8 bit": ("model.layers.0.q_proj.SCB", torch.zeros(2)),
    "bitsandbytes 4 bit": ("model.layers.0.q_proj.weight.absmax", torch.zeros(2)),
    "packed weight": ("model.layers.0.q_proj.weight", torch.zeros(2, 2, dtype=torch.uint8)),
    "integer weight": ("model.layers.0.q_proj.weight", torch.zeros(2, 2, dtype=torch.int8)),
    "fp8": ("model.layers.0.q_proj.weight", torch.zeros(2, 2).to(torch.float8_e4m3fn)),
    "fp8 scale": ("model.layers.0.q_proj.weight_scale_inv", torch.zeros(2)),
    "mxfp4": ("model.layers.0.mlp.experts.down_proj_blocks", torch.zeros(2, 2, dtype=torch.uint8)),
}


@pytest.mark.parametrize(("name", "tensor"), QUANTISED.values(), ids=QUANTISED)
def test_quantised_weights_are_refused(name: str, tensor: torch.Tensor, tmp_path: Path, single: WriteFolder) -> None:
    with pytest.raises(CheckpointError, match="already quantised"):
        read_index(single(tmp_path, {name: tensor}))


BUFFERS = {
    "causal mask": ("gpt_neox.layers.0.attention.bias", torch.ones(1, 1, 4, 4, dtype=torch.bool)),
    "old causal mask": ("h.0.attn.bias", torch.ones(1, 1, 4, 4, dtype=torch.uint8)),
    "position ids": ("embeddings.position_ids", torch.arange(4)),
    "relative position index": ("encoder.relative_position_index", torch.arange(4)),
}


@pytest.mark.parametrize(("name", "tensor"), BUFFERS.values(), ids=BUFFERS)
def test_integer_buffers_are_no_quantised_weights(
    name: str, tensor: torch.Tensor, tmp_path: Path, single: WriteFolder
) -> None:
    assert name in read_index(single(tmp_path, {name: tensor, "a.weight": WEIGHT})).entries


STALE: dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "QLoRA": (
        {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        ("quantization_config",),
        {"model_type": "llama"},
    ),
    "text part": (
        {"text_config": {"a": 1, "quantization_config": {"quant_method": "awq"}}},
        ("text_config.quantization_config",),
        {"text_config": {"a": 1}},
    ),
    "no method named": ({"compression_config": {"format": "dense"}}, ("compression_config",), {}),
}


@pytest.mark.parametrize(("config", "stale", "rest"), STALE.values(), ids=STALE)
def test_whole_weights_that_are_called_quantised(
    config: dict[str, Any], stale: tuple[str, ...], rest: dict[str, Any], tmp_path: Path, single: WriteFolder
) -> None:
    source = Checkpoint.open(single(tmp_path, {"a.weight": WEIGHT}, config))
    assert (source.index.stale_settings, source.config) == (stale, rest)
    assert stale[0] in source.index.notes[0]
    small = dict(lay_out(source, output_like(source, {}), None).small_files)
    assert json.loads(small["config.json"]) == rest
