"""What an error message says to do is done, on the very input that failed; and then the command works."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from merges.networks_on_disk import EMBEDDING, HIDDEN, language_model, write
from unmergeable.cli import main
from zoo import TOYS, write_toy

BAD_INPUT = 3

Command = Sequence[str | Path]


def run(command: Command, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command line, and what it printed on either stream."""
    capsys.readouterr()
    code = main([str(word) for word in command])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def options_of(message: str) -> list[list[str]]:
    """The options that a message offers, each with its value."""
    return [
        found.split() for found in re.findall(r"--[a-z-]+(?: (?:base|union|\d+|bfloat16|float16|float32)\b)?", message)
    ]


def follow(message: str, command: Command, out: Path) -> list[Command]:
    """The commands to try next: the same with each option that is offered, or with the folder that is to be passed."""
    if code := re.search(r'python -c "(.*)"', message):
        exec(code[1], {})
        return [command]
    if code := re.search(r"in Python: (.*)$|in Python \((.*)\) and pass", message.strip()):
        text = code[1] or code[2]
        finished = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", text],
            cwd=out.parent,
            env={**os.environ, "HF_HUB_CACHE": str(out.parent / "hub"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        made = re.search(r"save_pretrained\('(\w+)'\)", text)
        assert made is not None
        return [[command[0], out.parent / made[1], *command[2:]]]
    if typed := re.search(r"`([^`]+)`", message):
        run_typed(typed[1], out.parent)
        if "pass /" not in message:
            return [command]
    if folder := re.search(
        r"pass (?:its snapshot |one of them, as |the folder that holds it, )?(/\S+?)\.?(?:$|\s)", message
    ):
        meant = Path(folder[1])
        near = {meant, *meant.parents}
        return [[meant if near & {Path(word), Path(word).parent} else word for word in command]]
    tried = []
    for number, option in enumerate(options_of(message)):
        option = [*option, out.parent / "base"] if option == ["--base"] else option
        again = [out.with_name(f"{out.name}{number}") if word == out else word for word in command]
        tried.append([*again, *option])
    return tried


def run_typed(line: str, place: Path) -> None:
    """A line for a shell, with this Python's programs; ``BASE`` is the folder ``base`` of a test."""
    words = [word.replace("BASE", str(place / "base")) for word in shlex.split(line)]
    programs = {"python": [sys.executable], "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"]}
    finished = subprocess.run(
        [*programs.get(words[0], [words[0]]), *words[1:]], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def llama(folder: Path, seed: int = 0) -> Path:
    write_toy(TOYS["llama"], folder, seed=seed)
    return folder


def pickled(folder: Path, seed: int = 1) -> Path:
    llama(folder, seed)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def merge_pickled(place: Path) -> Command:
    base, expert = llama(place / "base"), pickled(place / "a")
    return "merge", "--base", base, "--expert", f"{expert}=1", "--method", "task_arithmetic", "--out", place / "out"


def inspect_pickled(place: Path) -> Command:
    return "inspect", pickled(place / "a")


def recover_pickled(place: Path) -> Command:
    base, expert = llama(place / "base"), pickled(place / "a")
    return "recover", expert, "--base", base, "--method", "nearest_orbit", "--out", place / "out"


def verify_pickled(place: Path) -> Command:
    return "verify", llama(place / "b", seed=1), pickled(place / "a")


def inspect_the_hubs_cache(place: Path) -> Command:
    cache = place / "models--org--name"
    for name in ("blobs", "refs", "snapshots"):
        (cache / name).mkdir(parents=True)
    llama(cache / "snapshots" / "abc")
    return "inspect", cache


def inspect_a_training_run(place: Path) -> Command:
    for step in (500, 1000):
        llama(place / "run" / f"checkpoint-{step}")
    return "inspect", place / "run"


def inspect_a_folder_of_one_model(place: Path) -> Command:
    """As axolotl and training scripts leave it: the merged model in a folder inside, beside steps of the run."""
    llama(place / "run" / "merged")
    llama(place / "run" / "checkpoint-10")
    return "inspect", place / "run"


def inspect_a_folder_of_two_models(place: Path) -> Command:
    for name in ("best", "last"):
        llama(place / "run" / name)
    return "inspect", place / "run"


def inspect_the_file_itself(place: Path) -> Command:
    return "inspect", llama(place / "a") / "model.safetensors"


# What zero_to_fp32.py is called with is DeepSpeed's own (checkpoint_dir output_dir [--safe_serialization]).
ZERO_TO_FP32 = """
import argparse, torch
from safetensors.torch import save_file
parser = argparse.ArgumentParser()
parser.add_argument("checkpoint_dir")
parser.add_argument("output_dir")
parser.add_argument("--safe_serialization", action="store_true")
arguments = parser.parse_args()
assert arguments.safe_serialization
state = torch.load(f"{arguments.checkpoint_dir}/global_step5/parts.pt")
save_file(state, f"{arguments.output_dir}/model.safetensors", {"format": "pt"})
"""


def inspect_deepspeed(place: Path) -> Command:
    folder = llama(place / "a b")
    (folder / "global_step5").mkdir()
    torch.save(load_file(folder / "model.safetensors"), folder / "global_step5" / "parts.pt")
    (folder / "model.safetensors").unlink()
    (folder / "zero_to_fp32.py").write_text(ZERO_TO_FP32)
    (folder / "latest").write_text("global_step5")
    return "inspect", folder


def inspect_fsdp(place: Path) -> Command:
    import torch.distributed.checkpoint as distributed

    folder = llama(place / "a")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process saves
        distributed.save({"model": state}, checkpoint_id=str(folder / "pytorch_model_fsdp_0"), no_dist=True)
    return "inspect", folder


def inspect_a_saved_state(place: Path) -> Command:
    """As accelerate's ``save_state`` leaves it."""
    llama(place / "base")
    folder = llama(place / "a", seed=1)
    (folder / "config.json").unlink()
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (folder / name).touch()
    return "inspect", folder


def inspect_other_names_of_shards(place: Path) -> Command:
    """As torchtune called them."""
    folder = llama(place / "a")
    shard = "ft-model-00001-of-00001.safetensors"
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), shard)
    (folder / "model.safetensors").rename(folder / shard)
    (folder / "ft-model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return "inspect", folder


def inspect_another_name_of_the_file(place: Path) -> Command:
    folder = llama(place / "a")
    (folder / "model.safetensors").rename(folder / "epoch_3.safetensors")
    return "inspect", folder


def inspect_pickled_shards(place: Path) -> Command:
    folder = llama(place / "a")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-0000{number % 2 + 1}-of-00002.bin" for number, name in enumerate(state)}
    for shard in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return "inspect", folder


def inspect_arrays(place: Path) -> Command:
    """As MLX kept them."""
    folder = llama(place / "a")
    arrays = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    numpy.savez(folder / "weights.npz", **arrays)
    (folder / "model.safetensors").unlink()
    return "inspect", folder


def inspect_an_adapter(place: Path) -> Command:
    base = llama(place / "base")
    name = next(name for name in load_file(base / "model.safetensors") if name.endswith("q_proj.weight"))
    rows, columns = load_file(base / "model.safetensors")[name].shape
    (place / "a").mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (place / "a" / "adapter_config.json").write_text(json.dumps(config))
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    update = {f"{stem}.lora_A.weight": torch.ones(1, columns), f"{stem}.lora_B.weight": torch.ones(rows, 1)}
    save_file(update, place / "a" / "adapter_model.safetensors")
    return "inspect", place / "a"


def inspect_gguf(place: Path) -> Command:
    """A GGUF file of a tiny Llama."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    generator, width, inner, rows = numpy.random.default_rng(0), 32, 64, 16
    (place / "a").mkdir()
    writer = gguf.GGUFWriter(place / "a" / "m-F32.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 4)
    writer.add_vocab_size(rows)
    layer = {
        "attn_q": (width, width),
        "attn_k": (width // 2, width),
        "attn_v": (width // 2, width),
        "attn_output": (width, width),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
        "attn_norm": (width,),
        "ffn_norm": (width,),
    }
    shapes = {"token_embd": (rows, width), "output": (rows, width), "output_norm": (width,)}
    for name, shape in (shapes | {f"blk.0.{name}": shape for name, shape in layer.items()}).items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return "inspect", place / "a"


UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
# diffusers' names of what a UNet holds, and the older ones that files of whole pipelines have (one layer a block).
OLDER = (
    (r"^time_embedding.linear_1", "time_embed.0"),
    (r"^time_embedding.linear_2", "time_embed.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^down_blocks.0.resnets.0", "input_blocks.1.0"),
    (r"^down_blocks.0.attentions.0", "input_blocks.1.1"),
    (r"^down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
    (r"^down_blocks.1.resnets.0", "input_blocks.3.0"),
    (r"^mid_block.resnets.0", "middle_block.0"),
    (r"^mid_block.attentions.0", "middle_block.1"),
    (r"^mid_block.resnets.1", "middle_block.2"),
    (r"^up_blocks.0.resnets.(\d)", r"output_blocks.\1.0"),
    (r"^up_blocks.0.upsamplers.0.conv", "output_blocks.1.1.conv"),
    (r"^up_blocks.1.resnets.0", "output_blocks.2.0"),
    (r"^up_blocks.1.resnets.1", "output_blocks.3.0"),
    (r"^up_blocks.1.attentions.0", "output_blocks.2.1"),
    (r"^up_blocks.1.attentions.1", "output_blocks.3.1"),
    (r"(blocks?.\d.*)\.norm1\.(weight|bias)$", r"\1.in_layers.0.\2"),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"(blocks?.\d.*)\.norm2\.(weight|bias)$", r"\1.out_layers.0.\2"),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)


def inspect_a_pipeline_in_one_file(place: Path) -> Command:
    """A tiny Stable Diffusion's UNet as user interfaces share it; its configuration lies in a cache of the hub."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    repository = place / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40) / "unet"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(UNET))
    network = diffusers.UNet2DConditionModel.from_config(UNET)
    state = {}
    for name, tensor in network.state_dict().items():
        older = name
        for pattern, replacement in OLDER:
            if "transformer_blocks" not in name or not pattern.startswith(("(", r"\.")):
                older = re.sub(pattern, replacement, older)
        state[f"model.diffusion_model.{older}"] = tensor.contiguous()
    (place / "a").mkdir()
    save_file(state, place / "a" / "v1-5-pruned.safetensors")
    return "inspect", place / "a"


def inspect_a_lora_of_a_pipeline(place: Path) -> Command:
    """As diffusers saves it, without a configuration."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    network = diffusers.UNet2DConditionModel.from_config(UNET)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = diffusers.StableDiffusionPipeline(
        unet=network, scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False, **nothing
    )
    pipeline.save_pretrained(place / "BASE")
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    update = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(network))
    pipeline.save_lora_weights(place / "a", unet_lora_layers=update)
    return "inspect", place / "a"


def merge(place: Path, base: Path, *experts: Path) -> Command:
    words = [word for expert in experts for word in ("--expert", f"{expert}=0.5")]
    return "merge", "--base", base, *words, "--method", "task_arithmetic", "--out", place / "out"


def merge_classifiers(place: Path) -> Command:
    heads = {"score.weight": torch.ones(3, HIDDEN)}
    experts = [write(place / name, {**language_model(seed), **heads}) for seed, name in enumerate("ab", 1)]
    return merge(place, write(place / "base", language_model(0)), *experts)


def merge_heads_of_other_labels(place: Path) -> Command:
    folders = [
        write(place / str(labels), {**language_model(labels), "classifier.weight": torch.ones(labels, HIDDEN)})
        for labels in (2, 3)
    ]
    return merge(place, *folders)


FAILING: list[Any] = [
    merge_pickled,
    inspect_pickled,
    recover_pickled,
    verify_pickled,
    inspect_the_hubs_cache,
    inspect_a_training_run,
    inspect_a_folder_of_one_model,
    inspect_a_folder_of_two_models,
    inspect_the_file_itself,
    inspect_deepspeed,
    inspect_fsdp,
    inspect_a_saved_state,
    inspect_other_names_of_shards,
    inspect_another_name_of_the_file,
    inspect_pickled_shards,
    inspect_arrays,
    inspect_an_adapter,
    inspect_gguf,
    pytest.param(inspect_a_pipeline_in_one_file, marks=pytest.mark.slow),  # diffusers, in a process of its own
    pytest.param(inspect_a_lora_of_a_pipeline, marks=pytest.mark.slow),
    merge_classifiers,
    merge_heads_of_other_labels,
]


@pytest.mark.parametrize("failing", FAILING, ids=lambda function: function.__name__)
def test_what_a_message_says_to_do_works(
    failing: Callable[[Path], Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = failing(tmp_path)
    code, message = run(command, capsys)
    assert code == BAD_INPUT, message
    assert len(message.strip().splitlines()) == 1
    remedies = follow(message, command, tmp_path / "out")
    assert remedies, message
    for remedy in remedies:
        code, printed = run(remedy, capsys)
        assert code == 0, printed


def test_files_that_contradict_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llama(tmp_path / "a")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    code, message = run(["inspect", folder], capsys)
    assert code == BAD_INPUT
    assert "remove the one that is out of date" in message
    (folder / "model.safetensors.index.json").unlink()
    assert run(["inspect", folder], capsys)[0] == 0


def test_a_note_that_names_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens left out are kept with what the note names."""
    tokens = {letter: row for row, letter in enumerate("abcdefghi")}
    longer = language_model(1)
    longer[EMBEDDING] = torch.cat([longer[EMBEDDING], torch.ones(1, HIDDEN)])
    base = write(tmp_path / "base", language_model(0), tokens)
    command = merge(tmp_path, base, write(tmp_path / "a", longer, {**tokens, "<x>": 9}))
    code, printed = run(command, capsys)
    assert code == 0
    (remedy,) = follow(printed, command, tmp_path / "out")
    assert run(remedy, capsys)[0] == 0
    assert load_file(tmp_path / "out0" / "model.safetensors")[EMBEDDING].shape == (10, HIDDEN)


@pytest.mark.slow
def test_the_precision_that_mergekit_is_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    from merges.mergekit.test_backend import write_llamas

    folders = write_llamas(tmp_path, 2, attention_bias=False)
    for folder in folders:
        tensors = load_file(folder / "model.safetensors")
        mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
        shutil.copy(folder / "config.json", tmp_path / "config.json")
        save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    command = [*merge(tmp_path, *folders), "--backend", "mergekit"]
    code, message = run(command, capsys)
    assert code == BAD_INPUT
    (remedy,) = follow(message, command, tmp_path / "out")
    assert run(remedy, capsys)[0] == 0
