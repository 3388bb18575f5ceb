"""A network of polynomials from its folder, by this package's own classes: no code from the folder is run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.load import quiet
from unmergeable.network.tasks import device_of


def _modeling() -> Any:
    """The module that is copied beside the weights. It imports transformers, which most commands do without."""
    return importlib.import_module("unmergeable.polynomials.modeling_polynomial")


def load_polynomial_network(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Any:
    """The network in evaluation mode on the CPU.

    Raises:
        BadInput: the folder holds no network of polynomials.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    name = str(next(iter(config.get("architectures") or ()), ""))
    network_class: Any = getattr(_modeling(), name, None) if name.startswith("Polynomial") else None
    if network_class is None:
        raise BadInput(f"{folder}/config.json names the network class {name!r}, which is none of polynomials.")
    with quiet(importlib.import_module("transformers")):
        return network_class.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype).eval()


@dataclass(frozen=True)
class Approximation:
    """How far a network of polynomials is from the original on some data.

    ``output_error``: of its first output (logits, or hidden states), relative in the Frobenius norm. ``outside``: share
    of activations that the guard acted on, by feed-forward.
    """

    output_error: float
    outside: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        shares = self.outside.values()
        return {
            "output_error": self.output_error,
            "outside_largest": max(shares),
            "outside_mean": sum(shares) / len(shares),
        }


@torch.no_grad()
def approximation(original: Any, polynomials: Any, batch: EncodedBatch) -> Approximation:
    """Run both networks on one batch; padding does not count."""
    moved = batch.to(device_of(original))
    with _modeling().guard_counted(polynomials) as counts:
        found = _output(polynomials, moved)
    expected = _output(original, moved)
    outside = {name: acted / max(1, seen) for name, (acted, seen) in counts.items()}
    return Approximation(float((found - expected).norm() / expected.norm()), outside)


def _output(network: Any, batch: EncodedBatch) -> Tensor:
    output: Tensor = network(**batch.inputs)[0]
    mask = batch.inputs.get("attention_mask")
    if mask is not None and output.dim() == 3 and output.shape[:2] == mask.shape:
        output = output[mask.bool()]
    return output.to(torch.float64)
