"""How far the outputs of two whole networks lie apart, where they fit in memory."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.source import TensorSource
from unmergeable.data.lines import Lines
from unmergeable.data.numpy_archive import read_arrays
from unmergeable.errors import BadInput, first_line, shown
from unmergeable.gauge.equivalence import MARGIN, UNIT_ROUNDOFF, amplified, off_by
from unmergeable.memory import available_memory
from unmergeable.network.load import encoded_texts, load_network, load_tokenizer
from unmergeable.progress import Progress, silent
from unmergeable.randomness import Stream

Found = TypeVar("Found", dict[str, Any], list[Any])

NETWORK_FACTOR = 64
"""Bound on the relative logit error, in units of u * condition: errors of many blocks, some amplified downstream."""

ARITHMETIC = 64 * 2.0**-24
"""Relative error of outputs computed in float32, however well the weights are stored."""

_HEAD = "lm_head.weight"

SMALL_NETWORK_BYTES = 1 << 30
"""In float32; larger networks are compared only on request, because loading them takes longer than protecting them."""


@dataclass(frozen=True)
class LogitGap:
    """``gap``: Frobenius norm of the difference of the outputs over that of the outputs, in float32 arithmetic.

    None where it was not measured, for ``reason``.
    """

    bound: float
    gap: float | None = None
    reason: str = ""

    @property
    def is_beyond_bound(self) -> bool:
        return self.gap is not None and not self.gap <= self.bound  # a NaN is beyond any bound

    def describe(self) -> str:
        """The figure beside its bound, or why there is none."""
        if self.gap is None:
            return f"not measured: {self.reason}"
        return f"{self.gap:.1e} relative; bound {self.bound:.1e}"

    def to_json(self) -> dict[str, Any]:
        return {"relative_gap": self.gap, "bound": self.bound, "not_measured_because": self.reason or None}


def logit_gap(
    first: TensorSource,
    second: TensorSource,
    condition: float,
    *,
    probe: Path | None = None,
    is_requested: bool = False,
    is_measured: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> LogitGap:
    """Load both networks one after the other and compare their outputs on the same inputs.

    Args:
        first, second: two checkpoints of one architecture.
        condition: condition number that may separate them.
        probe: inputs (see :func:`read_probe`); random ones when None.
        is_requested: also for networks that take a while to load, as long as memory allows.
        is_measured: take the bound from what simulated roundings of the weights do to the outputs. Otherwise this is
            done only where the outputs lie further apart than they do in most networks: in one whose scores are large
            (T5 divides by no root of the width) roundings of the weights go further, and measuring says how far.
        seed: of the random inputs.

    Where the first network cannot be loaded or run and no ``probe`` is given, the gap is not measured, and says why.

    Raises:
        BadInput: a ``probe`` that cannot be read, or that the networks do not take.
    """
    unit = max(UNIT_ROUNDOFF.get(source.spec(name).dtype, 0) for source in (first, second) for name in source.names)
    bound = NETWORK_FACTOR * unit * condition
    reason = _obstacle(first, second, is_requested or probe is not None)
    if reason:
        return LogitGap(bound, None, reason)

    def compared(rounding: float | None) -> LogitGap:
        progress("comparing outputs", 0, 2, "networks")
        try:
            expected, first_error = _outputs(first.folder, probe, seed, rounding)
        except Exception as error:  # transformers and diffusers raise anything over a network that they cannot run
            if probe is not None:
                raise
            return LogitGap(bound, None, f"the network could not be run ({first_line(error).rstrip('.;')})")
        progress("comparing outputs", 1, 2, "networks")
        found, second_error = _outputs(second.folder, probe, seed, rounding)
        progress("comparing outputs", 2, 2, "networks")
        measured = max(MARGIN * math.hypot(amplified(condition) * first_error, second_error), ARITHMETIC)
        return LogitGap(bound if rounding is None else measured, _gap(found, expected))

    gap = compared(unit if is_measured else None)
    return compared(unit) if gap.is_beyond_bound and not is_measured else gap


def _gap(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def _obstacle(first: TensorSource, second: TensorSource, is_requested: bool) -> str:
    """Why the networks cannot be run, empty when they can."""
    if not (isinstance(first, Checkpoint) and isinstance(second, Checkpoint)):
        return "an adapter or pickled checkpoint is compared block by block only"
    for source in (first, second):
        if source.index.names_on_disk or source.index.stale_settings:
            return f"no library loads {source.description} as it lies there"
    is_diffusion = "_class_name" in first.config
    library = "diffusers" if is_diffusion else "transformers"
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed; pip install 'unmergeable[{'diffusion' if is_diffusion else 'hf'}]'"
    name = str(next(iter(first.config.get("architectures") or ()), ""))
    if _HEAD in first.names and name.endswith("Model") and "For" not in name and "LMHead" not in name:
        return f"config.json names {name}, a network without the output head that the file has"
    nbytes = 4 * sum(first.spec(name).numel for name in first.names)
    if nbytes > SMALL_NETWORK_BYTES and not is_requested:
        return "the network takes a while to load; run `unmergeable verify` to measure it"
    available = available_memory()
    if 2 * nbytes > available:
        return f"the network needs {2 * nbytes / 1e9:.1f} GB in float32 and {available / 1e9:.1f} GB are available"
    return ""


@torch.no_grad()
def _outputs(folder: Path, probe: Path | None, seed: int, unit: float | None) -> tuple[Tensor, float]:
    """The outputs, and how far relative errors of ``unit`` in all weights move them (0 for None)."""
    network = load_network(folder, dtype=torch.float32)
    if probe is None:
        batches = _singles(random_inputs(network, seed), network)
    else:
        batches = read_probe(probe, folder)

    def run() -> Tensor:
        return torch.cat([main_output(network(**batch)).double().flatten() for batch in batches])

    outputs = run()
    if unit is None:
        return outputs, 0.0
    for name, parameter in network.named_parameters():
        parameter.copy_(off_by(parameter, unit, Stream.from_seed(seed).child(name)))
    return outputs, _gap(run(), outputs)


def main_output(result: Any) -> Tensor:
    """The first floating-point tensor of a model output: logits, sample, or hidden states."""
    for key in ("logits", "logits_per_image", "sample", "last_hidden_state", "image_embeds", "text_embeds"):
        value = getattr(result, key, None)
        if isinstance(value, Tensor):
            return value
    for value in result.to_tuple():
        last = value[-1] if isinstance(value, (tuple, list)) and value else value  # the feature maps of a backbone
        if isinstance(last, Tensor) and last.is_floating_point():
            return last
    raise BadInput(
        f"{type(result).__name__} holds no tensor to compare; the network cannot be verified by its outputs."
    )


def _singles(inputs: dict[str, Any], network: Any) -> list[dict[str, Any]]:
    """The inputs one by one for a classifier of texts that knows no padding: it takes no more at a time."""
    is_classifier = type(network).__name__.endswith("ForSequenceClassification")
    if set(inputs) != {"input_ids"} or not is_classifier or getattr(network.config, "pad_token_id", None) is not None:
        return [inputs]
    return [{"input_ids": row[None]} for row in inputs["input_ids"]]


def random_inputs(network: Any, seed: int, *, length: int = 16) -> dict[str, Any]:
    """Inputs of the right shapes for a transformers or diffusers network, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    config = network.config
    if hasattr(config, "cross_attention_dim"):  # a diffusers UNet
        width = config.cross_attention_dim
        width = width[0] if isinstance(width, (list, tuple)) else width
        side = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
        inputs = {
            "sample": torch.randn(1, config.in_channels, side, side, generator=generator),
            "timestep": torch.tensor(10),
            "encoder_hidden_states": torch.randn(1, 7, width, generator=generator),
        }
        if getattr(config, "addition_embed_type", None) == "text_time":  # SDXL: a pooled text, and six sizes
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            sizes = {"text_embeds": torch.randn(1, pooled, generator=generator), "time_ids": torch.full((1, 6), side)}
            return inputs | {"added_cond_kwargs": sizes}
        return inputs
    inputs = {}
    vision = getattr(config, "vision_config", config)
    text = getattr(config, "text_config", config)
    if hasattr(vision, "image_size"):
        side = vision.image_size
        height, width = (side, side) if isinstance(side, int) else side
        channels = getattr(vision, "num_channels", 3)
        inputs["pixel_values"] = torch.randn(2, channels, height, width, generator=generator)
    if getattr(text, "vocab_size", None):
        positions = getattr(text, "max_position_embeddings", None) or length
        ids = torch.randint(0, text.vocab_size, (2, min(length, positions)), generator=generator)
        # A choice among several texts: [examples, choices, tokens].
        inputs["input_ids"] = ids[None] if type(network).__name__.endswith("ForMultipleChoice") else ids
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids[:, : length // 2]
    return inputs


def read_probe(path: Path, folder: Path) -> list[dict[str, Tensor]]:
    """Inputs from a file: JSON lines of ``{"text": …}`` or ``{"input_ids": […]}``, or an ``.npz`` of arrays.

    Raises:
        BadInput: naming the file and line that cannot be used.
    """
    if not path.is_file():
        raise BadInput(f"probe {path} does not exist; give a .jsonl or .npz file.")
    if path.suffix == ".npz":
        return [{name: _numbers(array, f"{path}: {name!r}") for name, array in _some(read_arrays(path), path).items()}]
    lines = Lines(path)
    rows = [_probe_row(lines[number], lines.origin(number)) for number in range(len(lines))]
    return [_probe_inputs(row, folder) for row in _some(rows, path)]


def _some(found: Found, path: Path) -> Found:
    if not found:
        raise BadInput(f"probe {path} is empty; give at least one line or array.")
    return found


def _numbers(array: np.ndarray[Any, Any], where: str) -> Tensor:
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError):  # text, objects, foreign byte orders
        raise BadInput(f"{where} holds {shown(str(array.dtype))}, not numbers; write arrays of numbers.") from None


def _probe_row(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict) and (isinstance(row.get("text"), str) or _are_ids(row.get("input_ids"))):
        return row
    raise BadInput(f'{where}: expected {{"text": "…"}} or {{"input_ids": [whole numbers]}}; correct the line.')


def _are_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value)
    )


def _probe_inputs(row: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    if _are_ids(row.get("input_ids")):
        return {"input_ids": torch.tensor([row["input_ids"]], dtype=torch.long)}
    return dict(encoded_texts(load_tokenizer(folder), row["text"], return_tensors="pt"))
