"""How fast and lean `protect` and the rewrite loop under it are, against `cp` and `sync` of the same bytes in one run.

    python benchmarks/protect_speed.py SCRATCH [--gigabytes 6] [--rounds 3] [--ways protect …] [--keep]

Builds a checkpoint of Llama-8B-shaped bf16 tensors (largest 0.49 GB) in SCRATCH, then alternates four ways of
making a second one; `loop` and `rewrite` double every third tensor in place:

    cp        ``cp -r`` and ``sync`` of the file system
    loop      one thread: read a tensor, double it or not, write it; fsync at the end; no hashes, no journal
    rewrite   ``unmergeable.checkpoint.rewrite``: the same, hashed (input and output), journalled, resumable
    protect   ``unmergeable.protect`` with mergelock: the whole job, verified block by block from the written files

Each runs in a process of its own. Prints one JSON object: seconds of wall and CPU time and peak resident memory of
each round, and the median over rounds of the ratio to ``cp`` in the same round. ``start_up`` is what the process
spends before the work, mostly importing torch; it is in the memory and not in the ratio. The source is in the page
cache for all three if it fits. Everything is deleted at the end unless ``--keep`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

HIDDEN, KEY_VALUE, INTERMEDIATE, VOCABULARY = 4096, 1024, 14336, 60000
SHARD_BYTES = 2 << 30
WAYS = ("cp", "loop", "rewrite", "protect")


def shapes(nbytes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama-like checkpoint with as many layers as fit in ``nbytes`` of bf16."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)
    left = nbytes - 2 * 2 * VOCABULARY * HIDDEN
    layer = 0
    while left > 0:
        for name, shape in (
            ("input_layernorm", (HIDDEN,)),
            ("mlp.down_proj", (HIDDEN, INTERMEDIATE)),
            ("mlp.gate_proj", (INTERMEDIATE, HIDDEN)),
            ("mlp.up_proj", (INTERMEDIATE, HIDDEN)),
            ("post_attention_layernorm", (HIDDEN,)),
            ("self_attn.k_proj", (KEY_VALUE, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.v_proj", (KEY_VALUE, HIDDEN)),
        ):
            yield f"model.layers.{layer}.{name}.weight", shape
            left -= 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        layer += 1


def build(folder: Path, nbytes: int) -> None:
    """Write the checkpoint, one tensor in memory at a time."""
    import torch

    from unmergeable.checkpoint.header import TensorSpec
    from unmergeable.checkpoint.writer import ShardWriter

    shards: list[dict[str, TensorSpec]] = [{}]
    for name, shape in shapes(nbytes):
        if sum(spec.nbytes for spec in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = TensorSpec("BF16", shape)
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": sum("q_proj" in name for name, _ in shapes(nbytes)),
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).bfloat16()
    for number, specs in enumerate(shards, 1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with ShardWriter(folder / shard, specs.items(), {"format": "pt"}) as writer:
            for name, spec in specs.items():
                weight_map[name] = shard
                repeats = -(-spec.numel // block.numel())
                writer.write(name, block.repeat(repeats)[: spec.numel].view(spec.shape))
            writer.finish()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def double(tensor: Any) -> Any:
    """The cheap edit: in place, and exact in bf16."""
    return tensor.mul_(2)


def bare_loop(source: Path, out: Path) -> None:
    """The least that a rewrite has to do."""
    from unmergeable.checkpoint.header import raw_header
    from unmergeable.checkpoint.reader import Checkpoint
    from unmergeable.checkpoint.source import tensor_bytes

    checkpoint = Checkpoint.open(source)
    edited = set(checkpoint.names[::3])
    out.mkdir()
    for shard in checkpoint.index.shards.values():
        assert shard.path is not None
        with (out / shard.name).open("wb", buffering=0) as file:
            file.write(raw_header(shard.path, shard.header_bytes))
            for name in shard.tensors:
                tensor = checkpoint.tensor(name)
                view = tensor_bytes(double(tensor) if name in edited else tensor)
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())


def library(source: Path, out: Path) -> None:
    """The library's loop."""
    from unmergeable.checkpoint.reader import Checkpoint
    from unmergeable.checkpoint.rewrite import output_like, rewrite

    checkpoint = Checkpoint.open(source)
    plan = output_like(checkpoint, dict.fromkeys(checkpoint.names[::3], double))
    rewrite(checkpoint, out, plan, manifest={}, resume_token="benchmark")


def protect(source: Path, out: Path) -> None:
    """The owner's whole job, with the library's defaults."""
    import unmergeable

    key = out.with_suffix(".key")
    key.unlink(missing_ok=True)
    unmergeable.protect(source, base=source, out=out, method="mergelock", key=key)


def run_child(work: Callable[[Path, Path], None], source: Path, out: Path) -> None:
    """In the measured process: import what is needed, then time the work alone."""
    began = time.perf_counter()
    import torch

    torch.set_num_threads(1)
    ready = time.perf_counter()
    cpu = time.process_time()
    work(source, out)
    wall = time.perf_counter() - ready
    print(json.dumps({"wall": wall, "cpu": time.process_time() - cpu, "start_up": ready - began}))


def measure(way: str, source: Path, out: Path) -> dict[str, float]:
    """One round of one way, in a child process whose peak memory is its own."""
    os.sync()
    if way == "cp":
        began = time.perf_counter()
        subprocess.run(["cp", "-r", source, out], check=True)
        subprocess.run(["sync", "-f", out], check=True)
        return {"wall": time.perf_counter() - began}
    command = [sys.executable, __file__, str(source), "--child", way, "--out", str(out)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    answer = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{way} failed with status {child.returncode}")
    return {**json.loads(answer), "peak_rss_mb": usage.ru_maxrss * 1024 / 1e6}


def main() -> None:
    """Build, measure in alternation, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder on the disk to measure; created if missing")
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=WAYS[1:], help="what to measure besides cp")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint that was built, and reuse it")
    parser.add_argument("--child", choices=WAYS[1:], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(
            {"loop": bare_loop, "rewrite": library, "protect": protect}[arguments.child],
            arguments.scratch,
            arguments.out,
        )
        return

    arguments.scratch.mkdir(parents=True, exist_ok=True)
    source = arguments.scratch / f"llama-{arguments.gigabytes:g}gb"
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ("cp", *arguments.ways)}
    try:
        if not source.exists():
            build(source, int(arguments.gigabytes * 1e9))
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            for _ in range(arguments.rounds):
                for way in results:
                    out = Path(folder) / "out"
                    results[way].append(measure(way, source, out))
                    shutil.rmtree(out)
        nbytes = sum(path.stat().st_size for path in source.iterdir())
    finally:
        if not arguments.keep:
            shutil.rmtree(source, ignore_errors=True)
    ratios = {
        way: median(mine["wall"] / cp["wall"] for mine, cp in zip(results[way], results["cp"], strict=True))
        for way in arguments.ways
    }
    machine = {"processors": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()[0]}
    print(json.dumps({"bytes": nbytes, "ratio_to_cp": ratios, "rounds": results, "machine": machine}, indent=2))


if __name__ == "__main__":
    main()
