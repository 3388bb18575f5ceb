"""From a checkpoint folder to a live network, without remote code and without noise."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from unmergeable.errors import BadInput, UsageError


def load_network(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Any:
    """The network a checkpoint folder holds, in evaluation mode on the CPU.

    Its class is the one its config names: ``architectures[0]`` of transformers, or ``_class_name`` of diffusers.
    Code shipped inside the folder is never run.

    Raises:
        UsageError: transformers (or diffusers) is not installed.
        BadInput: the config names no class, or one the installed version does not have.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    is_diffusion = "_class_name" in config
    library = _library("diffusers" if is_diffusion else "transformers", "diffusion" if is_diffusion else "hf")
    name = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    kind = getattr(library, str(name), None) if name else None
    if kind is None:
        raise BadInput(
            f"{folder}/config.json names the network class {name!r}, unknown to {library.__name__} {library.__version__}."
        )
    with quiet(library):
        if is_diffusion:
            return kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).eval()
        return kind.from_pretrained(folder, dtype=dtype, trust_remote_code=False, local_files_only=True).eval()


def load_tokenizer(folder: Path | str) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises:
        UsageError: transformers is not installed.
        BadInput: the folder holds no tokenizer.
    """
    transformers = _library("transformers", "hf")
    with quiet(transformers):
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError) as error:
            first_line = str(error).splitlines()[0]
            raise BadInput(f"{folder} holds no usable tokenizer ({first_line}); give input_ids instead.") from None


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"{name} is not installed; pip install 'unmergeable[{extra}]'") from None


@contextmanager
def quiet(library: Any) -> Iterator[None]:
    """Silence a library's log, progress bars and warnings while it loads, and put everything back."""
    log = library.utils.logging
    level, bars = log.get_verbosity(), _bars_are_on(log)
    log.set_verbosity_error()
    log.disable_progress_bar()
    logging.captureWarnings(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _bars_are_on(log: Any) -> bool:
    return bool(getattr(log, "is_progress_bar_enabled", lambda: True)())
