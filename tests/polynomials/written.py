"""Toys whose feed-forwards were written as polynomials, calibrated on the toy's own inputs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.rewrite import rewrite
from unmergeable.network.encoding import EncodedBatch
from unmergeable.ops.opened import architecture_of
from unmergeable.polynomials.rewriting import Polynomials, Rewriting, UnitRanges, rewriting
from unmergeable.protections.activation_ranges import activation_ranges
from zoo import TOYS, Toy, load_toy, write_toy

GATED = (
    "llama",
    "llama-bias-tied-mqa",
    "llama-classification",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "flan-t5",
)
PLAIN = ("gpt2", "opt", "bert", "bert-embedding", "bert-classification", "vit", "dinov2", "t5")
FAMILIES = GATED + PLAIN


def basis_for(name: str) -> Any:
    """OPT and T5 of the zoo use ReLU, which has no Taylor series."""
    return "hermite" if name in ("opt", "t5") else "taylor"


@dataclass(frozen=True)
class Original:
    """A toy's folder with what its hidden units see on the inputs of ``seed`` 1."""

    toy: Toy
    folder: Path
    source: Checkpoint
    architecture: Architecture
    ranges: dict[str, UnitRanges]

    @property
    def inputs(self) -> dict[str, Any]:
        return self.toy.inputs(torch.Generator().manual_seed(1))

    def rewriting(self, polynomials: Polynomials) -> Rewriting:
        return rewriting(self.source, self.architecture, self.ranges, polynomials)

    def write(self, out: Path, polynomials: Polynomials) -> Path:
        """Write the network of polynomials to ``out``."""
        return write(out, self.rewriting(polynomials))


def write(out: Path, planned: Rewriting) -> Path:
    rewrite(planned.source, out, planned.plan, manifest={}, resume_token="test", config_changes=planned.config_changes)
    return out


def original(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Original:
    toy = TOYS[name]
    write_toy(toy, folder, dtype=dtype)
    source = Checkpoint.open(folder)
    architecture = architecture_of(source)
    network = load_toy(folder, toy)
    batch = EncodedBatch(toy.inputs(torch.Generator().manual_seed(1)))
    return Original(toy, folder, source, architecture, activation_ranges(network, architecture, [batch]))


def load_written(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The written network through transformers' own way in, code beside the weights and all."""
    import transformers

    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    auto = next((name for name in auto_map if name.startswith("AutoModelFor")), "AutoModel")
    options = {"trust_remote_code": True, "attn_implementation": "eager", "dtype": dtype}
    return getattr(transformers, auto).from_pretrained(folder, **options).eval()


def narrowed(ranges: dict[str, UnitRanges], factor: float) -> dict[str, UnitRanges]:
    """Every range ``factor`` times as wide, around the same centre."""
    return {
        name: replace(seen, low=seen.centre - factor * seen.radius, high=seen.centre + factor * seen.radius)
        for name, seen in ranges.items()
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
