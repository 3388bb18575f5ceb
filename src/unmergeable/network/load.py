"""From a checkpoint folder to a live network: no code that is not trusted, no pickle, no invented weight, no noise."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from unmergeable.errors import BadInput, CheckpointError, first_line
from unmergeable.network.tokenizer_check import require_usable
from unmergeable.optional import optional_package, quiet

_NO_NETWORK = ("AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor")
"""Entries of ``auto_map`` that name no network."""


def load_network(folder: Path | str, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Any:
    """The network a checkpoint folder holds, in evaluation mode on the CPU.

    Its class is the one its config names: ``architectures[0]`` of transformers, or ``_class_name`` of diffusers.
    Code shipped inside the folder is run only with ``trust_remote_code``, and only safetensors files are read.

    Raises:
        UsageError: transformers (or diffusers) is not installed.
        BadInput: no config, or it names no class that the installed version has.
        CheckpointError: the weights cannot be read, do not fit, or some are missing.
    """
    folder = Path(folder)
    config = _read_config(folder)
    is_diffusion = "_class_name" in config
    library = optional_package("diffusers" if is_diffusion else "transformers", "diffusion" if is_diffusion else "hf")
    name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    network_class: Any = getattr(library, str(name), None) if name else None
    if trust_remote_code and brings_code(config):
        network_class = _shipped_class(folder, config, str(name))
    if not hasattr(network_class, "from_pretrained") and brings_code(config):
        raise BadInput(
            f"{folder}/config.json names the network class {name!r} of its own code, which is run only in an audit "
            "whose plan says trust_remote_code: true beside this checkpoint; read the code, then write it there."
        )
    if not hasattr(network_class, "from_pretrained"):
        raise BadInput(
            f"{folder}/config.json names the network class {name!r},"
            f" unknown to {library.__name__} {library.__version__}; install a version that has it."
        )
    options: dict[str, Any] = (
        {"torch_dtype": dtype} if is_diffusion else {"dtype": dtype, "trust_remote_code": trust_remote_code}
    )
    with quiet(library):
        try:
            network, report = network_class.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} does not load as {name}: {first_line(error)}; check that its files are whole."
            ) from error
    _refuse_invented_weights(folder, str(name), report)
    return network.eval()


def network_of(config: Mapping[str, Any], where: str) -> Any:
    """A transformers network as a parsed ``config.json`` says, weights to be replaced; float32, evaluation mode.

    Raises:
        UsageError: transformers is not installed.
        BadInput: the config names no class that the installed version has.
    """
    library = optional_package("transformers", "hf")
    name = str(next(iter(config.get("architectures") or ()), None))
    network_class: Any = getattr(library, name, None)
    if not hasattr(network_class, "config_class"):
        raise BadInput(f"{where}: the network class {name!r} is unknown to transformers {library.__version__}.")
    with quiet(library):
        return network_class(network_class.config_class.from_dict(dict(config))).eval()


def brings_code(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has its network's class in a module of its own, beside the weights."""
    return any(not name.startswith(_NO_NETWORK) for name in config.get("auto_map") or ())


def _shipped_class(folder: Path, config: Mapping[str, Any], name: str) -> Any:
    """The network class in a folder's own module: the one that is called ``name``, or the first that it announces."""
    announced = [place for auto, place in config["auto_map"].items() if not auto.startswith(_NO_NETWORK)]
    chosen = next((place for place in announced if str(place).rpartition(".")[2] == name), announced[0])
    modules = importlib.import_module("transformers.dynamic_module_utils")
    try:
        return modules.get_class_from_dynamic_module(chosen, folder, local_files_only=True)
    except Exception as error:  # a stranger's module raises what it likes
        raise BadInput(
            f"{folder}: its own code does not load ({first_line(error)}); repair it, or ask who made it."
        ) from error


def load_tokenizer(folder: Path | str) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises:
        UsageError: transformers is not installed.
        BadInput: the folder holds no tokenizer, or one that cannot be its network's.
    """
    transformers = optional_package("transformers", "hf")
    with quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            require_usable(tokenizer, Path(folder))
        except BadInput:
            raise
        except Exception as error:  # of a damaged file it raises whatever its own readers do, some at the first text
            raise BadInput(
                f"{folder} holds no usable tokenizer ({first_line(error)}); give input_ids instead."
            ) from None
    return tokenizer


def encoded_texts(tokenizer: Any, texts: str | Sequence[str], **options: Any) -> Any:
    """What a tokenizer makes of texts; its own exceptions, of which a damaged file has any, become one line.

    Raises:
        BadInput: it cannot encode them.
    """
    try:
        return tokenizer(texts, **options)
    except Exception as error:
        folder = tokenizer.name_or_path
        raise BadInput(
            f"the tokenizer of {folder} cannot encode the texts ({first_line(error)}); restore its files."
        ) from error


def _read_config(folder: Path) -> Mapping[str, Any]:
    """``config.json``; an adapter's folder has none, and transformers would load the base it names without a word."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; give the folder of a whole checkpoint.") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({first_line(error)}); restore the file.") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path} is not a JSON object; restore the file.")
    return config


def _refuse_invented_weights(folder: Path, network_class: str, report: Mapping[str, Any]) -> None:
    """transformers draws at random what the files lack. Only the pooler may be so: many encoders ship without one."""
    missing = sorted(name for name in report["missing_keys"] if "pooler." not in name)
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights of {network_class} are missing, {missing[0]} among them;"
            " give a whole checkpoint."
        )
