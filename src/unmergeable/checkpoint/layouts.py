"""Where a folder's weights are, and what to do with one that holds something else than a checkpoint."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.header import read_header
from unmergeable.checkpoint.listing import ADAPTER_CONFIG_NAME, CONFIG_NAME, Kind, Listing, gguf_file
from unmergeable.errors import CheckpointError

# What transformers and diffusers call the weights; tried in the order their configurations suggest.
_STEMS = ("model", "diffusion_pytorch_model")
_OTHER_FORMATS = {
    ".onnx": "an ONNX file: pass the safetensors checkpoint it was exported from",
    ".h5": "TensorFlow weights: convert them to safetensors first",
    ".msgpack": "Flax weights: convert them to safetensors first",
    ".nemo": "an archive of NeMo's: export it to the Hugging Face format with NeMo, and pass the folder that makes",
    ".ckpt": "a pickle of the program that trained it (Lightning, an old Stable Diffusion): load it there, save the "
    "network with save_pretrained, and pass that folder",
}
_WHOLE = ("model.", "model-", "pytorch_model", "diffusion_pytorch_model")
_SINGLE_FILES = {
    "joint_blocks.": ("SD3Transformer2DModel", "transformer"),
    "double_blocks.": ("FluxTransformer2DModel", "transformer"),
    "model.diffusion_model.": ("UNet2DConditionModel", "unet"),
}
"""By what a name holds, the most telling first: the class of diffusers that reads such a file, and a folder's name."""
_DIFFUSION_LORA = re.compile(
    r"^lora_(unet|te\d?|transformer)_|^(unet|transformer|text_encoder(_\d)?)\..*(\.lora[._]|\.alpha$|lora_magnitude)"
)
_TEXTUAL_INVERSION = {"emb_params", "clip_g", "clip_l", "string_to_param"}
_NO_WEIGHTS = re.compile(r"optimizer|scheduler|training_args|random_states|sampler|scaler|custom_checkpoint")
_LAST = re.compile(r"checkpoint-(\d+)")


def weights_of(listing: Listing, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The name of the index of the weights, if there is one, or else of the one file that holds them.

    Raises:
        CheckpointError: there are none, or more than one can be meant.
    """
    folder, names = listing.folder, list(listing.files)
    stems = _STEMS[::-1] if "_class_name" in config or "_diffusers_version" in config else _STEMS
    for stem in stems:
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if single in names and index in names:
            raise CheckpointError(
                f"{folder} holds both {single}, which loaders read, and {index}, which they then pass over: remove the "
                "one that is out of date."
            )
        if single in names or index in names:
            return (None, single) if single in names else (index, "")
    for stem in stems:
        # A variant: model.fp16.safetensors, or model.safetensors.index.fp16.json and its shards.
        singles = [name for name in names if re.fullmatch(rf"{stem}\.[A-Za-z0-9_]+\.safetensors", name)]
        indexes = [name for name in names if re.fullmatch(rf"{stem}\.safetensors\.index\.[A-Za-z0-9_]+\.json", name)]
        if len(singles) + len(indexes) > 1:
            raise CheckpointError(
                f"{folder} holds several variants ({', '.join(singles + indexes)}): keep the one to read."
            )
        if singles or indexes:
            return (None, singles[0]) if singles else (indexes[0], "")
    raise CheckpointError(_no_weights(listing))


def require_checkpoint(listing: Listing) -> None:
    """Refuse a folder without a configuration, saying what it is instead.

    Raises:
        CheckpointError: with the folder or the command to use.
    """
    if CONFIG_NAME not in listing.files:
        raise CheckpointError(
            _inner_folder(listing)
            or _parts(listing)
            or _other_format(listing)
            or _other_program(listing)
            or _diffusion_lora(listing)
            or _single_file(listing)
            or _no_config(listing)
            or f"{listing.folder} has no {CONFIG_NAME}: pass the folder of a transformers or diffusers model."
        )


def only_pickled(listing: Listing) -> str:
    """The line for a folder without safetensors files, with the command that makes one of a single pickle."""
    names = listing.names(Kind.PICKLED_WEIGHTS) or _other_pickles(listing)
    line = f"{listing.folder} holds only pickled weights ({names[0]}), which can run code when opened: "
    if len(names) > 1:
        return f"{line}convert them to safetensors"
    pickle, out = (str(listing.folder / name) for name in (names[0], "model.safetensors"))
    convert = (
        "import torch; from safetensors.torch import save_file; "
        f"state = torch.load({pickle!r}, weights_only=True); "
        f"save_file({{name: value.clone() for name, value in state.items()}}, {out!r}, {{'format': 'pt'}})"
    )
    return f'{line}convert them to safetensors: python -c "{convert}"'


def _no_weights(listing: Listing) -> str:
    folder = listing.folder
    if listing.names(Kind.WEIGHTS):
        return _other_names(listing)
    if listing.is_pickled:
        return f"{only_pickled(listing)}."
    return (
        _parts(listing)
        or _other_format(listing)
        or _other_program(listing)
        or _inner_folder(listing)
        or (f"{only_pickled(listing)}." if _other_pickles(listing) else None)
        or f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json."
    )


def _other_pickles(listing: Listing) -> list[str]:
    """Pickles under names that no loader looks for, which may be the weights."""
    found = listing.names(Kind.OTHER_WEIGHTS)
    return [name for name in found if Path(name).suffix in (".pt", ".pth", ".bin") and not _NO_WEIGHTS.match(name)]


def _other_names(listing: Listing) -> str:
    """Safetensors files that no loader looks for, and what they have to be called."""
    folder, stray = listing.folder, listing.names(Kind.WEIGHTS)
    indexes = listing.names(Kind.WEIGHTS_INDEX)
    if any(name.startswith("adapter_model") for name in stray):
        return (
            f"{folder} has {stray[0]}, an adapter's weights, and no adapter_config.json: copy the one that was saved "
            "with it there."
        )
    for name, wanted in ((indexes, "model.safetensors.index.json"), (stray, "model.safetensors")):
        if len(name) == 1:
            old, new = (shlex.quote(str(folder / file)) for file in (name[0], wanted))
            return f"{folder} has {name[0]}, which loaders look for as {wanted}: rename it, `mv {old} {new}`."
    return (
        f"{folder} has {stray[0]} but no index that names it; expected model.safetensors or "
        "model.safetensors.index.json: download the missing files."
    )


def _no_config(listing: Listing) -> str | None:
    """Weights as accelerate's ``save_state`` and bare state dicts leave them."""
    weights = listing.names(Kind.WEIGHTS, Kind.PICKLED_WEIGHTS)
    if not weights:
        return None
    if not weights[0].startswith(_WHOLE):
        return _other_names(listing) if listing.names(Kind.WEIGHTS) else None
    return (
        f"{listing.folder} has {weights[0]} and no {CONFIG_NAME}: copy that of the model it was trained from there, "
        f"`cp BASE/{CONFIG_NAME} {shlex.quote(str(listing.folder))}`."
    )


def _inner_folder(listing: Listing) -> str | None:
    """The folder inside this one that is meant: a snapshot of the hub's cache, a model, or a step of a training run."""
    folder = listing.folder
    if {"snapshots", "blobs"} <= set(listing.files):
        snapshots = sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime)
        main = folder / "refs" / "main"
        if main.is_file() and (current := folder / "snapshots" / main.read_text().strip()) in snapshots:
            snapshots.append(current)
        if snapshots:
            return f"{folder} is a repository of the hub's cache: pass its snapshot {snapshots[-1]}."
    steps = [(int(match[1]), name) for name in listing.files if (match := _LAST.fullmatch(name))]
    models = [
        name
        for name in listing.names(Kind.FOLDER, Kind.WEIGHTS_FOLDER)
        if not _LAST.fullmatch(name) and (folder / name / CONFIG_NAME).is_file() and _has_weights(folder / name)
    ]
    if len(models) > 1:
        return f"{folder} holds {len(models)} models ({', '.join(models)}): pass one of them, as {folder / models[0]}."
    if models:
        beside = f" and {len(steps)} checkpoints of a training run" if steps else ""
        return f"{folder} holds a model in {models[0]}{beside}: pass {folder / models[0]}."
    if steps:
        last = folder / max(steps)[1]
        return f"{folder} holds {len(steps)} checkpoints of a training run and no model of its own: pass {last}."
    inner = listing.names(Kind.FOLDER, Kind.WEIGHTS_FOLDER)
    adapters = [name for name in inner if (folder / name / ADAPTER_CONFIG_NAME).is_file()]
    if len(adapters) > 1:
        several = f"{len(adapters)} adapters ({', '.join(adapters)})"
        return f"{folder} holds {several}: pass one of them, as {folder / adapters[0]}."
    return f"{folder} holds an adapter in {adapters[0]}: pass {folder / adapters[0]}." if adapters else None


def _has_weights(folder: Path) -> bool:
    return any(path.name.startswith(_WHOLE) and path.suffix in (".safetensors", ".bin") for path in folder.iterdir())


def _parts(listing: Listing) -> str | None:
    """Weights in parts, as many processes save them, and the command that puts them together."""
    folder = listing.folder
    quoted = shlex.quote(str(folder))
    names = list(listing.files)
    if any(name.startswith("global_step") for name in names) or any("zero_pp_rank" in name for name in names):
        script = f"{quoted}/zero_to_fp32.py" if "zero_to_fp32.py" in names else "-m deepspeed.utils.zero_to_fp32"
        return (
            f"{folder} holds DeepSpeed's parts of the weights: run `python {script} {quoted} {quoted} "
            "--safe_serialization` first."
        )
    if any(name.endswith(".distcp") for name in names):
        return _merge_sharded(folder, folder, folder.parent)
    for name in listing.names(Kind.FOLDER, Kind.WEIGHTS_FOLDER):
        if any((folder / name).glob("*.distcp")):
            return _merge_sharded(folder, folder / name, folder)
    if "latest_checkpointed_iteration.txt" in names or any(re.fullmatch(r"iter_\d+", name) for name in names):
        return (
            f"{folder} holds Megatron's parts of the weights: export them to the Hugging Face format with Megatron "
            "Bridge, and pass the folder that makes."
        )
    return None


def _merge_sharded(folder: Path, parts: Path, out: Path) -> str:
    command = f"accelerate merge-weights {shlex.quote(str(parts))} {shlex.quote(str(out))}"
    return f"{folder} holds the parts of the weights that FSDP saved: run `{command}` first, then pass {out}."


def _other_format(listing: Listing) -> str | None:
    folder = listing.folder
    for name in listing.files:
        if name.lower().endswith(".gguf"):
            return gguf_file(folder / name)
        if name.endswith(".npz"):
            old, new = (str(folder / file) for file in (name, "model.safetensors"))
            convert = (
                "import numpy; from safetensors.numpy import save_file; "
                f"save_file(dict(numpy.load({old!r})), {new!r}, {{'format': 'pt'}})"
            )
            return f'{folder} holds {name}, arrays of MLX: convert them to safetensors: python -c "{convert}"'
        if meaning := _OTHER_FORMATS.get(Path(name).suffix):
            return f"{folder} holds {name}, {meaning}."
        if name.startswith("openvino"):
            return f"{folder} holds {name}, an OpenVINO model: pass the safetensors checkpoint it was exported from."
    if "onnx" in listing.files and not listing.names(Kind.WEIGHTS, Kind.PICKLED_WEIGHTS):
        return f"{folder} holds only ONNX files: pass the safetensors checkpoint they were exported from."
    return None


def _other_program(listing: Listing) -> str | None:
    """Weights under the names that another program gives them, and who turns them into transformers'."""
    folder, names = listing.folder, list(listing.files)
    if "params.json" in names and (found := [name for name in names if name.startswith("consolidated")]):
        return (
            f"{folder} holds {found[0]}, weights under the names of their makers' own code: pass a folder with the "
            f"files for transformers ({CONFIG_NAME}, model.safetensors), which most makers publish beside them."
        )
    if "lit_model.pth" in names:
        return (
            f"{folder} holds lit_model.pth, weights under LitGPT's names: convert it with LitGPT and pass the result."
        )
    if (folder / "weights").is_dir() and (folder / "context").is_dir():
        return (
            f"{folder} holds a checkpoint of NeMo's: export it to the Hugging Face format with NeMo, and pass the "
            "folder that makes."
        )
    return None


def _single_file(listing: Listing) -> str | None:
    """A diffusion pipeline in one file, or its denoiser under its makers' names, as user interfaces share them."""
    files = listing.names(Kind.WEIGHTS)
    if len(files) != 1:
        return None
    names = _names_inside(listing, files[0])
    for marker, (kind, folder) in _SINGLE_FILES.items():
        if any(marker in name for name in names):
            load = f"{kind}.from_single_file({str(listing.folder / files[0])!r})"
            return (
                f"{listing.folder} has {files[0]} and no {CONFIG_NAME}: of a diffusion pipeline in one file, convert "
                f"the denoiser in Python (from diffusers import {kind}; {load}.save_pretrained({folder!r})) and pass "
                f"{folder}."
            )
    return None


def _diffusion_lora(listing: Listing) -> str | None:
    """Low-rank updates or embeddings of a diffusion pipeline, which are shared without a configuration."""
    for file in listing.names(Kind.WEIGHTS):
        names = _names_inside(listing, file)
        if names and all(_DIFFUSION_LORA.search(name) for name in names):
            fuse = (
                "from diffusers import DiffusionPipeline; pipeline = DiffusionPipeline.from_pretrained('BASE'); "
                f"pipeline.load_lora_weights({str(listing.folder)!r}, weight_name={file!r}); pipeline.fuse_lora(); "
                "pipeline.unload_lora_weights(); "
                "(getattr(pipeline, 'unet', None) or pipeline.transformer).save_pretrained('fused')"
            )
            return (
                f"{listing.folder} has {file}, a LoRA of a diffusion pipeline and no adapter of peft's: merge it into "
                f"the pipeline it was trained on, BASE, in Python ({fuse}) and pass fused."
            )
        if names and set(names) <= _TEXTUAL_INVERSION:
            return (
                f"{listing.folder} has {file}, embeddings of new tokens (textual inversion) and no network: nothing of "
                "it can be merged or protected."
            )
    return None


def _names_inside(listing: Listing, file: str) -> list[str]:
    return [entry.name for entry in read_header(listing.file(file).path, file).entries]
