"""What feed-forwards as polynomials cost a real language model, and what an attacker gets back.

    python benchmarks/polynomial_language_model.py CHECKPOINT SCRATCH [--tokens 1024] [--calibration 4096] [--out FILE]

CHECKPOINT is any folder that ``transformers`` loads as a causal language model of a supported family; the committed
figures are of SmolLM2-135M-Instruct (Llama, SiLU, 30 layers, bfloat16; ``real_language_model.py`` says how to get it).
Text is the language reference that comes with Python (``pydoc_data.topics``), one part for calibration and another for
evaluation. Every row is a checkpoint written to SCRATCH and loaded with ``trust_remote_code=True``.

    loss            mean over tokens, in nats, float32 arithmetic; ``change`` is that minus the original's
    outside         share of activations that the guard acted on, in the evaluation text
    error           of the polynomials within the calibrated ranges, in units of the activation: median and largest unit
    slowdown        wall time of one forward pass of 64 tokens, and of one token with a cache, over the original's;
                    medians of alternating runs, one thread
    inversion       ``taylor_inversion``: largest relative error of a projection, share of entries equal bit by bit,
                    seconds of CPU, and the loss of the recovered checkpoint
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.attacks.base import Inputs
from unmergeable.attacks.taylor_inversion import TaylorInversion
from unmergeable.checkpoint.plan import output_like
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.rewrite import rewrite
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.load import load_network, load_tokenizer
from unmergeable.ops.opened import architecture_of
from unmergeable.optional import quiet
from unmergeable.polynomials.modeling_polynomial import guard_counted
from unmergeable.polynomials.rewriting import Polynomials, Rewriting, UnitRanges, rewriting
from unmergeable.protections.activation_ranges import activation_ranges
from unmergeable.protections.mergebarrier import MergeBarrier
from unmergeable.protections.taylor_mlp import TaylorMLP
from unmergeable.tasks.likelihood import cache_name

WINDOW = 256
REPEATS = 5

METHODS: Mapping[str, TaylorMLP | MergeBarrier] = {
    "taylor_mlp": TaylorMLP(),
    "taylor_mlp order=4": TaylorMLP(order=4),
    "taylor_mlp order=6": TaylorMLP(order=6),
    "taylor_mlp as_published": TaylorMLP(as_published=True),
    "taylor_mlp share=0.9": TaylorMLP(share=0.9),
    "taylor_mlp share=1": TaylorMLP(share=1.0),
    "mergebarrier": MergeBarrier(),
    "mergebarrier share=1": MergeBarrier(share=1.0),
    "mergebarrier share=1, taylor": MergeBarrier(share=1.0, basis="taylor"),
    "mergebarrier as_published": MergeBarrier(as_published=True),
}
ORDERS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Bench:
    """The original and what was seen of it."""

    folder: Path
    scratch: Path
    source: Checkpoint
    architecture: Architecture
    ranges: Mapping[str, UnitRanges]
    windows: Tensor

    def write(self, planned: Rewriting) -> Path:
        out = self.scratch / "protected"
        shutil.rmtree(out, ignore_errors=True)
        rewrite(planned.source, out, planned.plan, manifest={}, resume_token="", config_changes=planned.config_changes)
        return out


def text_windows(tokenizer: Any, calibration: int, evaluation: int) -> tuple[Tensor, Tensor]:
    """Windows of WINDOW tokens, int64 [windows, WINDOW] each; calibration comes first, evaluation from the end."""
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    assert len(ids) >= calibration + evaluation, f"the text holds {len(ids)} tokens"
    count = calibration // WINDOW, evaluation // WINDOW
    first, last = ids[: count[0] * WINDOW], ids[-count[1] * WINDOW :]
    return torch.tensor(first).view(-1, WINDOW), torch.tensor(last).view(-1, WINDOW)


@torch.no_grad()
def loss(network: Any, windows: Tensor) -> float:
    """Mean over the tokens of all windows, in nats."""
    return statistics.fmean(float(network(input_ids=window[None], labels=window[None]).loss) for window in windows)


def load(folder: Path) -> Any:
    with quiet(transformers):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32
        ).eval()


def row(bench: Bench, planned: Rewriting, original_loss: float) -> tuple[dict[str, Any], Path]:
    """Write, load and evaluate one network of polynomials."""
    began = time.process_time()
    out = bench.write(planned)
    seconds = time.process_time() - began
    network = load(out)
    with guard_counted(network) as counts:
        found = loss(network, bench.windows)
    outside, seen = (sum(count[index] for count in counts.values()) for index in (0, 1))
    errors = planned.errors.values()
    return {
        "loss": found,
        "change": found - original_loss,
        "outside": outside / seen,
        "median_error": statistics.median(error["median"] for error in errors),
        "largest_error": max(error["largest"] for error in errors),
        "gigabytes": sum(file.stat().st_size for file in out.iterdir()) / 1e9,
        "writing_cpu_seconds": seconds,
    }, out


@torch.no_grad()
def slowdown(original: Any, network: Any, ids: Tensor) -> dict[str, float]:
    """Wall time over the original's, runs of the two alternating."""

    def forward(model: Any) -> float:
        began = time.perf_counter()
        model(input_ids=ids)
        return time.perf_counter() - began

    def token(model: Any, cache: Any) -> float:
        began = time.perf_counter()
        model(input_ids=ids[:, -1:], use_cache=True, **{cache_name(model): cache})
        return time.perf_counter() - began

    models = (original, network)
    passes = [[forward(model) for model in models] for _ in range(REPEATS)]
    caches = [getattr(model(input_ids=ids, use_cache=True), cache_name(model)) for model in models]
    tokens = [[token(model, cache) for model, cache in zip(models, caches, strict=True)] for _ in range(REPEATS)]
    ratios = {"forward": passes, "token": tokens}
    return {
        name: statistics.median(time[1] for time in times) / statistics.median(time[0] for time in times)
        for name, times in ratios.items()
    }


def inversion(bench: Bench, protected: Path) -> dict[str, float]:
    """Recover, compare with the expert's projections, and evaluate."""
    began = time.process_time()
    recovered = TaylorInversion().recover(Inputs(Checkpoint.open(protected), bench.source, bench.architecture))
    out = bench.scratch / "recovered"
    shutil.rmtree(out, ignore_errors=True)
    rewrite(recovered.template, out, output_like(recovered.template, recovered.edits), manifest={}, resume_token="")
    seconds = time.process_time() - began
    found = Checkpoint.open(out)
    errors, equal, entries = [], 0, 0
    for block in bench.architecture.feed_forwards:
        theirs, ours = bench.source.tensor(block.down.weight), found.tensor(block.down.weight)
        errors.append(float((ours.double() - theirs.double()).norm() / theirs.double().norm()))
        equal, entries = equal + int((ours == theirs).sum()), entries + ours.numel()
    return {
        "largest_relative_error": max(errors),
        "equal_entries": equal / entries,
        "cpu_seconds": seconds,
        "loss": loss(load_network(out), bench.windows),
    }


def in_float32(bench: Bench) -> Path:
    """The original with its weights stored in float32."""
    out = bench.scratch / "float32"
    if not out.exists():
        load_network(bench.folder).save_pretrained(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    began = time.process_time()

    def say(text: str) -> None:
        print(f"{time.process_time() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    source = Checkpoint.open(arguments.checkpoint)
    architecture = architecture_of(source)
    original = load_network(arguments.checkpoint)
    calibration, windows = text_windows(load_tokenizer(arguments.checkpoint), arguments.calibration, arguments.tokens)
    started = time.process_time()
    ranges = activation_ranges(
        original, architecture, [EncodedBatch({"input_ids": window[None]}) for window in calibration]
    )
    calibration_seconds = time.process_time() - started
    bench = Bench(arguments.checkpoint, arguments.scratch, source, architecture, ranges, windows)
    original_loss = loss(original, windows)
    say(f"original {original_loss:.4f}")
    report: dict[str, Any] = {
        "model": f"{architecture.family}, {source.config.get('_model_name_or_path', arguments.checkpoint.name)}",
        "text": f"pydoc_data.topics of Python {platform.python_version()}, "
        f"SHA-256 {hashlib.sha256(json.dumps(topics, sort_keys=True).encode()).hexdigest()}",
        "calibration_tokens": calibration.numel(),
        "evaluation_tokens": windows.numel(),
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "original_loss": original_loss,
        "calibration_cpu_seconds": calibration_seconds,
        "methods": {},
        "orders": {},
        "inversion": {},
    }
    for name, method in METHODS.items():
        found, out = row(bench, method.rewriting(source, architecture, ranges), original_loss)
        if name in ("taylor_mlp", "mergebarrier"):
            found["slowdown"] = slowdown(original, load(out), windows[:1, :64])
            report["inversion"][f"{name} bfloat16"] = inversion(bench, out)
        report["methods"][name] = found
        say(f"{name}: {json.dumps(rounded(found))}")
    # The error of the polynomials alone, by order: no network is run.
    for order in ORDERS:
        row_by_basis = {}
        for basis in ("taylor", "hermite"):
            errors = rewriting(source, architecture, ranges, Polynomials(basis, order, 0.7)).errors.values()
            row_by_basis[basis] = {
                "median": statistics.median(error["median"] for error in errors),
                "largest": max(error["largest"] for error in errors),
            }
        report["orders"][str(order)] = row_by_basis
    wide = Checkpoint.open(in_float32(bench))
    wide_bench = Bench(arguments.scratch / "float32", arguments.scratch, wide, architecture, ranges, windows)
    # What rounding the coefficients to bfloat16 costs: the same weights, stored in float32.
    planned = METHODS["mergebarrier"].rewriting(wide, architecture, ranges)
    report["methods"]["mergebarrier stored in float32"], out = row(wide_bench, planned, original_loss)
    report["inversion"]["mergebarrier float32"] = inversion(wide_bench, out)
    say(f"inversion: {json.dumps(rounded(report['inversion']))}")
    report["cpu_seconds"] = time.process_time() - began
    text = json.dumps(rounded(report), indent=2) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")
    shutil.rmtree(arguments.scratch, ignore_errors=True)


def rounded(value: Any) -> Any:
    """Floats to four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return value


if __name__ == "__main__":
    main()
