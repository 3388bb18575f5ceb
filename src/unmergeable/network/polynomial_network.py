"""A network of polynomials from its folder, by this package's own classes: no code from the folder is run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from unmergeable.errors import BadInput
from unmergeable.optional import quiet


def load_polynomial_network(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Any:
    """The network in evaluation mode on the CPU.

    Raises:
        BadInput: the folder holds no network of polynomials.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    name = str(next(iter(config.get("architectures") or ()), ""))
    # The module that is copied beside the weights. It imports transformers, which most commands do without.
    modeling = importlib.import_module("unmergeable.polynomials.modeling_polynomial")
    network_class: Any = getattr(modeling, name, None) if name.startswith("Polynomial") else None
    if network_class is None:
        raise BadInput(f"{folder}/config.json names the network class {name!r}, which is none of polynomials.")
    with quiet(importlib.import_module("transformers")):
        return network_class.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype).eval()
