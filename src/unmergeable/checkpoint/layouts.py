"""Where a folder's weights are, and what to do with one that holds something else than a checkpoint."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.listing import CONFIG_NAME, Kind, Listing
from unmergeable.errors import CheckpointError

# What transformers and diffusers call the weights; tried in the order their configurations suggest.
_STEMS = ("model", "diffusion_pytorch_model")
_OTHER_FORMATS = {
    ".onnx": "an ONNX file: pass the safetensors checkpoint it was exported from",
    ".h5": "TensorFlow weights: convert them to safetensors first",
    ".msgpack": "Flax weights: convert them to safetensors first",
}
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
            or _other_format(listing)
            or _single_file(listing)
            or f"{listing.folder} has no {CONFIG_NAME}: pass the folder of a transformers or diffusers model."
        )


def only_pickled(listing: Listing) -> str:
    """The line for a folder without safetensors files, with the command that makes one of a single pickle."""
    names = listing.names(Kind.PICKLED_WEIGHTS)
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
    if stray := listing.names(Kind.WEIGHTS):
        return (
            f"{folder} has {stray[0]} but no index that names it; expected model.safetensors or "
            "model.safetensors.index.json: download the missing files."
        )
    if listing.is_pickled:
        return f"{only_pickled(listing)}."
    return (
        _other_format(listing)
        or _inner_folder(listing)
        or f"{folder} has no weights: expected model.safetensors or model.safetensors.index.json."
    )


def _inner_folder(listing: Listing) -> str | None:
    """The folder inside this one that is meant: a snapshot of the hub's cache, or a step of a training run."""
    folder = listing.folder
    if {"snapshots", "blobs"} <= set(listing.files):
        snapshots = sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime)
        main = folder / "refs" / "main"
        if main.is_file() and (current := folder / "snapshots" / main.read_text().strip()) in snapshots:
            snapshots.append(current)
        if snapshots:
            return f"{folder} is a repository of the hub's cache: pass its snapshot {snapshots[-1]}."
    steps = [(int(match[1]), name) for name in listing.files if (match := _LAST.fullmatch(name))]
    if steps:
        last = folder / max(steps)[1]
        return f"{folder} holds {len(steps)} checkpoints of a training run and no model of its own: pass {last}."
    if any(name.startswith("global_step") for name in listing.files) and "zero_to_fp32.py" in listing.files:
        quoted = shlex.quote(str(folder))
        return (
            f"{folder} holds DeepSpeed's parts of the weights: run `python {quoted}/zero_to_fp32.py {quoted} {quoted} "
            "--safe_serialization` first."
        )
    return None


def _other_format(listing: Listing) -> str | None:
    folder = listing.folder
    for name in listing.names(Kind.OTHER_WEIGHTS):
        if name.endswith(".gguf"):
            load = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, gguf_file={name!r})"
            return (
                f"{folder} holds {name}, a GGUF file: convert it to safetensors first, in Python: "
                f"from transformers import AutoModelForCausalLM; {load}.save_pretrained('converted')"
            )
        if meaning := _OTHER_FORMATS.get(Path(name).suffix):
            return f"{folder} holds {name}, {meaning}."
    return None


def _single_file(listing: Listing) -> str | None:
    """All of a diffusion pipeline in one file, as user interfaces share them."""
    files = listing.names(Kind.WEIGHTS)
    if len(files) != 1 or files[0].startswith(_STEMS):
        return None
    load = f"UNet2DConditionModel.from_single_file({str(listing.folder / files[0])!r})"
    return (
        f"{listing.folder} has {files[0]} and no {CONFIG_NAME}: of a diffusion pipeline in one file, convert the UNet "
        f"in Python (from diffusers import UNet2DConditionModel; {load}.save_pretrained('unet')) and pass unet."
    )
