"""From a live network back to a checkpoint folder."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

from unmergeable.optional import quiet


def write_network(network: Any, folder: Path | str, *, config_from: Path | str) -> None:
    """Write the weights of a transformers network under their names on disk, beside an unchanged config.

    transformers renames tensors when it loads them and undoes that when it saves. Its config it would write anew,
    with keys of the installed version; the copy keeps what the original checkpoint said.

    Args:
        network: a transformers network.
        folder: made when missing.
        config_from: the folder of the checkpoint the network was loaded from.
    """
    folder = Path(folder)
    with quiet(importlib.import_module("transformers")):
        network.save_pretrained(folder)
    shutil.copyfile(Path(config_from) / "config.json", folder / "config.json")
