"""Checkpoints by their name on the Hugging Face hub: ``hub:OWNER/NAME`` or ``hub:OWNER/NAME@REVISION``.

:mod:`.hub_upload` is the other direction.

What is downloaded is what the library reads: safetensors weights, configurations, tokenizers. Pickled weights stay
where they are, and so does code that is not asked for. The files lie in the hub's own cache, so that a second run
downloads nothing.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unmergeable.errors import BadInput, UsageError, first_line

PREFIX = "hub:"

READ = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md")

CODE = "*.py"

RELEASED = (*READ, CODE, "LICENCE*", "USE_POLICY*", "*.spm", "bpe.codes", "vocab.*", "chat_template.*")
"""Everything that a release may consist of; its code is looked at, and not run."""

# A path holds one slash where an address has two.
_ADDRESS = re.compile(r"(https?:/+)?(www\.)?(huggingface\.co|hf\.co)/(?P<name>[^/?#]+/[^/?#]+)")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_on_hub(text: str) -> bool:
    """Whether a text names a repository on the hub and not a path."""
    return text.startswith(PREFIX)


def download(text: str, *, with_code: bool = False, whole: bool = False) -> Path:
    """The folder of a checkpoint on the hub, downloaded unless it is in the cache.

    ``with_code``: its modules as well; ``whole``: whatever a release consists of.

    Raises:
        UsageError: huggingface_hub is not installed.
        BadInput: the name is none, or the hub cannot be reached, has no such repository, or wants a login.
    """
    name, _, revision = text.removeprefix(PREFIX).partition("@")
    if not is_repository(name):
        raise BadInput(f"{text}: no name of a repository; write {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION.")
    hub, errors = _library(text)
    with _asking(text, errors):
        patterns = [*RELEASED] if whole else [*READ, *([CODE] if with_code else [])]
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))


def download_file(text: str, file: str) -> Path | None:
    """One file of a repository on the hub, downloaded unless it is in the cache; None where it has none of this name.

    Raises:
        UsageError, BadInput: as :func:`download`.
    """
    name, _, revision = text.removeprefix(PREFIX).partition("@")
    if not is_repository(name):
        raise BadInput(f"{text}: no name of a repository; write {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION.")
    hub, errors = _library(text)
    with _asking(text, errors):
        try:
            return Path(hub.hf_hub_download(name, file, revision=revision or None))
        except errors.RemoteEntryNotFoundError:
            return None


def is_repository(name: str) -> bool:
    """Whether this can be the name of a repository, ``OWNER/NAME``."""
    return _NAME.fullmatch(name) is not None


def _library(text: str) -> tuple[Any, Any]:
    """huggingface_hub and its errors, which are imported where the hub is meant."""
    try:
        return importlib.import_module("huggingface_hub"), importlib.import_module("huggingface_hub.errors")
    except ImportError:
        raise UsageError(f"{text} lies on the hub: pip install 'unmergeable[hf]', or give a local folder.") from None


@contextmanager
def _asking(text: str, errors: Any) -> Iterator[None]:
    try:
        yield
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        raise BadInput(
            f"{text} cannot be downloaded ({first_line(error)}); check the name, your login, or download it."
        ) from None


def folder_of(checkpoint: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint that is named by a path, or by ``hub:OWNER/NAME`` and downloaded.

    Raises:
        UsageError, BadInput: as :func:`download`.
        BadInput: nothing is there, and the text is an address on the hub, or may be a name there.
    """
    text = os.fspath(checkpoint)
    if is_on_hub(text):
        return download(text)
    path = Path(text)
    address = _ADDRESS.match(text)
    name = address["name"] if address else text
    if (address or (is_repository(name) and not path.parent.exists())) and not path.exists():
        raise BadInput(
            f"{text} is no folder here; if the model on the Hugging Face hub is meant, write {PREFIX}{name}."
        )
    return path
