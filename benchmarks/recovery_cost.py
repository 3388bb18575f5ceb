"""What `nearest_orbit` costs an attacker: a Llama-shaped checkpoint of 1.1 billion weights, and assignments by width.

    python benchmarks/recovery_cost.py SCRATCH [--layers 22] [--widths 1536 5632 11008 14336]

Builds a base of random bf16 weights with TinyLlama's shapes in SCRATCH, and an expert of it (task vector of 5 %) whose
heads, hidden units and every basis inside the blocks are hidden under a random key. Then measures, each in a process
of its own:

    recover      ``unmergeable.recover(method="nearest_orbit")``: the estimate, and the whole job with the file written
    assignment   hidden units of one gated feed-forward at each width (input width 4096 from 11 008 on, else 2048): the
                 similarity matrix and its assignment, once where a key is planted (the best columns differ and are read
                 off) and once against an unrelated base, where SciPy has to solve the problem

Prints one JSON object: seconds of wall and CPU time, peak resident memory, and for `recover` the distances, which say
that it worked. Everything is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN, HEADS, GROUPS, INTERMEDIATE, VOCABULARY = 2048, 32, 4, 5632, 32000
TASK_VECTOR = 0.05


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """TinyLlama's tensors."""
    key_value = HIDDEN // HEADS * GROUPS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        found |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in (
                ("input_layernorm", (HIDDEN,)),
                ("self_attn.q_proj", (HIDDEN, HIDDEN)),
                ("self_attn.k_proj", (key_value, HIDDEN)),
                ("self_attn.v_proj", (key_value, HIDDEN)),
                ("self_attn.o_proj", (HIDDEN, HIDDEN)),
                ("post_attention_layernorm", (HIDDEN,)),
                ("mlp.gate_proj", (INTERMEDIATE, HIDDEN)),
                ("mlp.up_proj", (INTERMEDIATE, HIDDEN)),
                ("mlp.down_proj", (HIDDEN, INTERMEDIATE)),
            )
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def build(scratch: Path, layers: int) -> tuple[Path, Path]:
    """Write the base, and the expert under a key."""
    import torch

    from unmergeable.checkpoint.header import TensorSpec
    from unmergeable.checkpoint.rewrite import rewrite
    from unmergeable.checkpoint.writer import ShardWriter
    from unmergeable.gauge.gauge import sampled_gauge
    from unmergeable.gauge.plan import transformed
    from unmergeable.ops.opened import open_with_architecture
    from unmergeable.randomness import Stream

    def random(shape: tuple[int, ...], seed: str, scale: float) -> torch.Tensor:
        key = int.from_bytes(Stream.from_seed(0).child(seed).key[:7], "little")
        return scale * torch.randn(shape, generator=torch.Generator().manual_seed(key))

    base, expert, protected = (scratch / name for name in ("base", "expert", "protected"))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    specs = {name: TensorSpec("BF16", shape) for name, shape in shapes(layers).items()}
    for folder, share in ((base, 0.0), (expert, TASK_VECTOR)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        with ShardWriter(folder / "model.safetensors", specs.items(), {"format": "pt"}) as writer:
            for name, spec in specs.items():
                scale = spec.shape[-1] ** -0.5
                weight = random(spec.shape, name, scale) if len(spec.shape) > 1 else torch.ones(spec.shape)
                if share:
                    weight += random(spec.shape, f"task.{name}", share * (scale if len(spec.shape) > 1 else 1.0))
                writer.write(name, weight.bfloat16())
            writer.finish()
    source, architecture = open_with_architecture(expert)
    roles = ("query_key", "value_output", "heads", "feed_forward")
    key = sampled_gauge(architecture.symmetry.select(*roles), Stream.from_seed(1), 4.0)
    rewrite(source, protected, transformed(source, architecture.symmetry, [key]), manifest={}, resume_token="benchmark")
    return base, protected


def recover(base: Path, protected: Path, out: Path) -> dict[str, Any]:
    """The attacker's whole job."""
    import unmergeable

    result = unmergeable.recover(protected, base=base, method="nearest_orbit", out=out)
    return {
        "estimate_cpu": result.cpu_seconds,
        "distance_before": result.distance_before,
        "distance_after": result.distance_after,
        "confidence": result.confidence,
    }


def assign(width: int, *, is_planted: bool) -> dict[str, Any]:
    """One feed-forward's hidden units, permuted and scaled; or against a base it has nothing to do with."""
    import torch

    from unmergeable.architecture import FeedForward
    from unmergeable.architecture.blocks import Heads
    from unmergeable.attacks.hidden_units import unit_similarity
    from unmergeable.gauge.assignment import best_assignment

    features = 4096 if width >= 11008 else 2048
    generator = torch.Generator().manual_seed(0)
    block = FeedForward(
        "mlp", width, Heads("up", None, 0, 0, 0), Heads("down", None, 1, 0, 0), Heads("gate", None, 0, 0, 0)
    )
    base, protected = {}, {}
    order = torch.randperm(width, generator=generator)
    for name, axis in (("gate", 0), ("up", 0), ("down", 1)):
        shape = (width, features) if axis == 0 else (features, width)
        base[name] = torch.randn(shape, generator=generator)
        protected[name] = torch.randn(shape, generator=generator)
        if is_planted:
            protected[name] = (base[name] + TASK_VECTOR * protected[name]).index_select(axis, order)
    began = time.perf_counter(), time.process_time()
    similarity = unit_similarity(block, protected, base)
    middle = time.perf_counter(), time.process_time()
    found = best_assignment(similarity)
    end = time.perf_counter(), time.process_time()
    return {
        "width": width,
        "features": features,
        "planted": is_planted,
        "right": float((order[found] == torch.arange(width)).float().mean()) if is_planted else None,
        "similarity_wall": middle[0] - began[0],
        "similarity_cpu": middle[1] - began[1],
        "assignment_wall": end[0] - middle[0],
        "assignment_cpu": end[1] - middle[1],
    }


def in_child(arguments: list[str]) -> dict[str, Any]:
    """Run this file again with ``arguments``; what it prints, and its peak memory."""
    child = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    answer = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed with status {child.returncode}")
    return {**json.loads(answer), "peak_rss_mb": usage.ru_maxrss * 1024 / 1e6}


def timed(work: Callable[[], dict[str, Any]]) -> None:
    """Print what ``work`` returns, with its wall and CPU time."""
    import torch  # not counted

    import unmergeable.ops  # noqa: F401

    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    times = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps({**found, **times, "threads": torch.get_num_threads()}))


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder for the checkpoints, 9 GB; created if missing")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--widths", type=int, nargs="*", default=[1536, 5632, 11008, 14336])
    parser.add_argument("--recover", nargs=2, type=Path, metavar=("BASE", "PROTECTED"), help=argparse.SUPPRESS)
    parser.add_argument("--assign", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--unrelated", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.recover:
        timed(lambda: recover(*arguments.recover, arguments.scratch / "recovered"))
        return
    if arguments.assign:
        timed(lambda: assign(arguments.assign, is_planted=not arguments.unrelated))
        return

    work = arguments.scratch / "recovery-cost"
    work.mkdir(parents=True)
    try:
        assignments = [
            in_child([str(work), "--assign", str(width), *extra])
            for width in arguments.widths
            for extra in ([], ["--unrelated"])
        ]
        base, protected = build(work, arguments.layers)
        recovered = in_child([str(work), "--recover", str(base), str(protected)])
        parameters = sum(path.stat().st_size for path in base.glob("*.safetensors")) // 2
    finally:
        shutil.rmtree(work, ignore_errors=True)
    machine = {"processors": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()[0]}
    document = {
        "parameters": parameters,
        "layers": arguments.layers,
        "recover": recovered,
        "assignments": assignments,
        "machine": machine,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
