"""Data sets by their name on the Hugging Face hub: ``hub:OWNER/NAME#SPLIT``, perhaps with revision and configuration.

    hub:openai/gsm8k:main#test        hub:owner/name@v1.0:main#train

A data set is downloaded by ``datasets`` and written beside its cache with ``save_to_disk``, so that from then on it is
local files like any other, which can be hashed. No code of a data set is run (``datasets`` has given that up in 4.0).
"""

from __future__ import annotations

import importlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from unmergeable.errors import BadInput, UsageError

_NAME = re.compile(
    r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<config>[\w.-]+))?#(?P<split>[\w.-]+)"
)


def download_data(text: str) -> Path:
    """The folder of a data set on the hub, downloaded unless it is in the cache.

    Raises:
        UsageError: ``datasets`` is not installed.
        BadInput: the name is none, or the hub cannot be reached or has no such data set, or the disk is full.
    """
    named = _NAME.fullmatch(text)
    if named is None:
        raise BadInput(f"{text}: no name of a data set; write hub:OWNER/NAME#SPLIT or hub:OWNER/NAME:CONFIG#SPLIT.")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UsageError(f"{text} lies on the hub: pip install 'unmergeable[data]', or give local data.") from None
    try:
        rows = datasets.load_dataset(named["name"], named["config"], split=named["split"], revision=named["revision"])
        # the fingerprint changes with the content, so a new revision is another folder
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "unmergeable" / str(rows._fingerprint)
        if not folder.exists():
            _save(rows, folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise BadInput(f"{text} cannot be downloaded ({reason}); check the name, your login, or download it.") from None
    return folder


def _save(rows: Any, folder: Path) -> None:
    """Written elsewhere and renamed: a folder that is there is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        rows.save_to_disk(f"{beside}/rows")
        shutil.move(f"{beside}/rows", folder)
