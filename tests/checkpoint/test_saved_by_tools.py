"""What people's tools leave of a fine-tune: it is opened, or one true line says what to do.

Lines that name a command, a folder or an option are followed in ``contracts/test_remedies.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import CheckpointError
from zoo import TOYS, write_toy

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    write_toy(TOYS["llama"], folder, seed=0)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def state_of(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def save(folder: Path, state: State, name: str = "model.safetensors") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / name, {"format": "pt"})


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x80")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split(folder: Path, stem: str = "model") -> None:
    """The weights in two files and their index."""
    state = state_of(folder)
    (folder / "model.safetensors").unlink()
    files = {name: f"{stem}-{number % 2 + 1:05}-of-00002.safetensors" for number, name in enumerate(state)}
    for file in set(files.values()):
        save(folder, {name: state[name] for name in state if files[name] == file}, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def trainer(folder: Path) -> set[str]:
    """transformers' Trainer, one step of a run."""
    names = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "trainer_state.json", "training_args.bin")
    touch(folder, *names)
    return set(names)


def trainer_under_deepspeed(folder: Path) -> set[str]:
    """The same under ZeRO-3 that gathered the weights."""
    touch(folder, "global_step500/zero_pp_rank_0_mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py")
    touch(folder, "rng_state_0.pth", "rng_state_1.pth")
    return {"global_step500/", "latest", "zero_to_fp32.py", "rng_state_0.pth", "rng_state_1.pth"}


def trl_with_a_value_head(folder: Path) -> set[str]:
    state = {f"pretrained_model.{name}": tensor for name, tensor in state_of(folder).items()}
    save(folder, state | {"v_head.summary.weight": torch.ones(1, 4), "v_head.summary.bias": torch.ones(1)})
    return set()


def torch_compiled(folder: Path) -> set[str]:
    save(folder, {f"_orig_mod.{name}": tensor for name, tensor in state_of(folder).items()})
    return set()


def unsloth_merged_16bit(folder: Path) -> set[str]:
    split(folder)
    change_config(folder, unsloth_version="2026.1.1", unsloth_fixed=True, torch_dtype="bfloat16")
    touch(folder, "chat_template.jinja", "special_tokens_map.json")
    return set()


def qlora_merged(folder: Path) -> set[str]:
    """Weights are whole, and the configuration still says that they were loaded in four bits."""
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return set()


def llama_factory(folder: Path) -> set[str]:
    names = ("all_results.json", "train_results.json", "trainer_log.jsonl", "training_loss.png", "trainer_state.json")
    touch(folder, *names)
    touch(folder, "checkpoint-500/model.safetensors")
    return {*names, "checkpoint-500/"}


def axolotl_full(folder: Path) -> set[str]:
    touch(folder, "checkpoint-10/optimizer.pt", "runs/events.out.tfevents.1", "axolotl_config.yml", "debug.log")
    return {"checkpoint-10/", "runs/", "axolotl_config.yml", "debug.log"}


def with_another_format_beside(folder: Path) -> set[str]:
    names = ("model-Q4_K_M.gguf", "pytorch_model.bin", "consolidated.safetensors")
    touch(folder, *names, "onnx/model.onnx", "original/consolidated.00.pth")
    return {*names, "onnx/", "original/"}


def variant(folder: Path) -> set[str]:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    return set()


def mlx(folder: Path) -> set[str]:
    """mlx-lm's ``fuse`` and ``convert`` without quantisation."""
    save_file(state_of(folder), folder / "model.safetensors", {"format": "mlx"})
    return set()


def sentence_transformers(folder: Path) -> set[str]:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    touch(folder, "config_sentence_transformers.json", "sentence_bert_config.json")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    touch(folder, "eval/similarity_evaluation_results.csv", "train_script.py")
    return {"eval/", "train_script.py"}


OPENED: list[Callable[[Path], set[str]]] = [
    trainer,
    trainer_under_deepspeed,
    trl_with_a_value_head,
    torch_compiled,
    unsloth_merged_16bit,
    qlora_merged,
    llama_factory,
    axolotl_full,
    with_another_format_beside,
    variant,
    mlx,
    sentence_transformers,
]


@pytest.mark.parametrize("saved", OPENED, ids=lambda function: function.__name__)
def test_is_opened(saved: Callable[[Path], set[str]], model: Path, tmp_path: Path) -> None:
    """With the values that were saved, under the names that loaders know; and what else lies there is not copied."""
    folder = Path(shutil.copytree(model, tmp_path / "saved"))
    beside = saved(folder)
    source, expected = open_checkpoint(folder, allow_pickle=False), state_of(model)
    names = [name for name in source.names if not name.startswith("v_head.")]
    assert set(names) == set(expected)
    assert all(torch.equal(source.tensor(name), expected[name]) for name in names)
    assert {left.name for left in source.index.left_out} == beside
    assert "quantization_config" not in source.config


def test_a_component_of_a_pipeline(model: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(model, pipeline / "text_encoder")
    (pipeline / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert len(open_checkpoint(pipeline / "text_encoder").names) == len(state_of(model))
    with pytest.raises(CheckpointError, match=f"pass one of its component folders .{pipeline / 'text_encoder'}"):
        open_checkpoint(pipeline)


def test_a_snapshot_in_the_hubs_cache(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(model.iterdir()):
        shutil.copy(file, cache / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    assert len(open_checkpoint(snapshot).names) == len(state_of(model))


def peft(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    touch(folder, "adapter_model.safetensors", "all_results.json", "trainer_log.jsonl")


def peft_without_its_configuration(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def adapters_in_folders(folder: Path) -> None:
    """peft's own way to save several: one folder for each name."""
    for name in ("math", "code"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "base_model_name_or_path": "org/base"}'
        )
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()


def adapter_in_a_folder(folder: Path) -> None:
    adapters_in_folders(folder)
    shutil.rmtree(folder / "math")


def only(folder: Path, name: str, *keys: str) -> None:
    """One file without a configuration, with small tensors of these names."""
    for file in ("model.safetensors", "config.json"):
        (folder / file).unlink()
    save_file({key: torch.ones(2, 2) for key in keys}, folder / name, {"format": "pt"})


def kohya(folder: Path) -> None:
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    only(folder, "style.safetensors", f"{block}.lora_down.weight", f"{block}.lora_up.weight", f"{block}.alpha")


def lora_of_a_pipeline(folder: Path) -> None:
    only(
        folder,
        "pytorch_lora_weights.safetensors",
        *(f"unet.mid_block.to_q.lora.{part}.weight" for part in ("down", "up")),
    )


def textual_inversion(folder: Path) -> None:
    only(folder, "learned_embeds.safetensors", "emb_params")


def flux(folder: Path) -> None:
    only(folder, "flux1-dev.safetensors", "double_blocks.0.img_attn.qkv.weight", "img_in.weight")


def stable_diffusion_3(folder: Path) -> None:
    only(folder, "sd3_medium.safetensors", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight")


def unsloth_merged_4bit(folder: Path) -> None:
    state = {name: tensor for name, tensor in state_of(folder).items() if not name.endswith("up_proj.weight")}
    packed = {"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 1, dtype=torch.uint8)}
    packed["model.layers.0.mlp.up_proj.weight.absmax"] = torch.ones(1)
    save(folder, state | packed)
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def mlx_quantised(folder: Path) -> None:
    state = state_of(folder)
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 1, dtype=torch.uint32)
    state["model.layers.0.mlp.up_proj.scales"] = torch.ones(8, 1)
    save(folder, state)
    change_config(folder, quantization={"group_size": 64, "bits": 4})


def torchao(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    touch(folder, "pytorch_model.bin")
    change_config(folder, quantization_config={"quant_method": "torchao", "quant_type": "int4_weight_only"})


def saved_empty_under_zero_3(folder: Path) -> None:
    save(folder, {name: torch.empty(0) for name in state_of(folder)})


def without_weights(folder: Path, *names: str) -> None:
    (folder / "model.safetensors").unlink()
    touch(folder, *names)


def without_anything(folder: Path, *names: str) -> None:
    for file in folder.iterdir():
        file.unlink()
    touch(folder, *names)


def deepspeed(folder: Path) -> None:
    without_weights(folder, "global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest")


def fsdp_parts_themselves(folder: Path) -> None:
    without_anything(folder, "__0_0.distcp", ".metadata")


def torchtune(folder: Path) -> None:
    without_weights(folder, "hf_model_0001_0.pt")


def meta(folder: Path) -> None:
    without_anything(folder, "consolidated.00.pth", "params.json", "tokenizer.model")


def mistral(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    touch(folder, "params.json", "tekken.json")


def litgpt(folder: Path) -> None:
    without_anything(folder, "lit_model.pth", "model_config.yaml")


def lightning(folder: Path) -> None:
    without_anything(folder, "epoch=1-step=100.ckpt")


def megatron(folder: Path) -> None:
    without_anything(folder, "latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt")


def nemo(folder: Path) -> None:
    without_anything(folder, "model.nemo")


def nemo_2(folder: Path) -> None:
    without_anything(folder, "weights/common.pt", "context/model.yaml")


def gguf(folder: Path) -> None:
    without_anything(folder, "model-Q4_K_M.gguf", "README.md")


def openvino(folder: Path) -> None:
    without_weights(folder, "openvino_model.bin", "openvino_model.xml")


def onnx(folder: Path) -> None:
    without_weights(folder, "onnx/model.onnx")


def tensorflow(folder: Path) -> None:
    without_weights(folder, "tf_model.h5")


def two_shards_without_an_index(folder: Path) -> None:
    split(folder)
    (folder / "model.safetensors.index.json").unlink()


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (peft, r"is an adapter, not a checkpoint: give the base it was trained on \(org/base\) with --base"),
    (adapters_in_folders, r"holds 2 adapters \(code, math\): pass one of them, as \S+saved/code\.$"),
    (adapter_in_a_folder, r"holds an adapter in code: pass \S+saved/code\.$"),
    (kohya, r"style.safetensors, a LoRA of a diffusion pipeline .*weight_name='style.safetensors'"),
    (lora_of_a_pipeline, "pytorch_lora_weights.safetensors, a LoRA of a diffusion pipeline"),
    (textual_inversion, "textual inversion.* nothing of it can be merged or protected"),
    (flux, "FluxTransformer2DModel.from_single_file"),
    (stable_diffusion_3, "SD3Transformer2DModel.from_single_file"),
    (peft_without_its_configuration, "adapter_model.safetensors, an adapter's weights, and no adapter_config.json"),
    (unsloth_merged_4bit, "already quantised by 'bitsandbytes'"),
    (mlx_quantised, "already quantised .*weight in U32"),
    (torchao, "only pickled weights"),
    (saved_empty_under_zero_3, "DeepSpeed ZeRO-3 without gathering"),
    (deepspeed, r"`python -m deepspeed.utils.zero_to_fp32 \S+ \S+ --safe_serialization`"),
    (fsdp_parts_themselves, "accelerate merge-weights"),
    (torchtune, "only pickled weights .hf_model_0001_0.pt"),
    (meta, "consolidated.00.pth, weights under the names of their makers' own code"),
    (mistral, "consolidated.safetensors, weights under the names of their makers' own code"),
    (litgpt, "LitGPT"),
    (lightning, "epoch=1-step=100.ckpt, a pickle of the program that trained it"),
    (megatron, "Megatron's parts"),
    (nemo, "an archive of NeMo's"),
    (nemo_2, "a checkpoint of NeMo's"),
    (gguf, "model-Q4_K_M.gguf, a GGUF file: convert it"),
    (openvino, "an OpenVINO model: pass the safetensors checkpoint"),
    (onnx, "only ONNX files: pass the safetensors checkpoint"),
    (tensorflow, "TensorFlow weights"),
    (two_shards_without_an_index, "no index that names it"),
]


@pytest.mark.parametrize(("saved", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_is_refused_in_one_line(saved: Callable[[Path], None], message: str, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "saved"))
    saved(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder, allow_pickle=False)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "saved") in str(caught.value)
