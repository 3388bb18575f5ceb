"""What ``protect --ray`` costs: by one process without a cluster, and by one and two workers of one of this machine.

    python -m benchmarks.protect_on_ray SCRATCH [--layers 16] [--ray ADDRESS] [--json FILE]

Builds a Llama of random weights in bfloat16 in SCRATCH, one file for each layer, with a base of the same shape, and
protects it with the default method and a public seed. Prints one JSON object: whether all results are the same bytes;
for each way the seconds on the clock, and of all processes that did the work together the processor seconds, the bytes
they read and wrote (from the cache of the system or the disk), and the largest memory of one that wrote. Starting
processes and the cluster is not counted. Everything is deleted at the end; it takes five times the model's size on the
disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unmergeable import ops
from unmergeable.ops import protection
from unmergeable.pools.pool import Call
from unmergeable.pools.ray_pool import LOCAL, RayPool

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY = 1536, 4096, 12, 4, 32000
SEED = 5
CALLS_PER_WORKER = 8
"""Enough that every worker answers."""

Use = Mapping[str, float]


def write_model(folder: Path, layers: int, seed: int) -> int:
    """Random weights, a file for each layer and one for the ends; the bytes of all files with tensors."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    def gain() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(HIDDEN, generator=generator)).bfloat16()

    key_value = HIDDEN // HEADS * KEY_VALUE_HEADS
    shards: list[dict[str, torch.Tensor]] = [
        {
            "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
            "model.norm.weight": gain(),
            "lm_head.weight": matrix(VOCABULARY, HIDDEN),
        }
    ]
    weight_map: dict[str, str] = {}
    for number in range(layers + 1):
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        if number > 0:
            layer = f"model.layers.{number - 1}."
            shards = [
                {
                    f"{layer}self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
                    f"{layer}self_attn.k_proj.weight": matrix(key_value, HIDDEN),
                    f"{layer}self_attn.v_proj.weight": matrix(key_value, HIDDEN),
                    f"{layer}self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
                    f"{layer}mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
                    f"{layer}mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
                    f"{layer}mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
                    f"{layer}input_layernorm.weight": gain(),
                    f"{layer}post_attention_layernorm.weight": gain(),
                }
            ]
        (shard,) = shards
        save_file(shard, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return size


def used() -> tuple[int, dict[str, float]]:
    """This process, and what it used since it began."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return os.getpid(), {
        "cpu_seconds": time.process_time(),
        "bytes_read": float(io["rchar"]),
        "bytes_written": float(io["wchar"]),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
    }


class Counted(RayPool):
    """A pool that asks its workers at both ends what they used."""

    before: Mapping[int, Use] = {}
    after: Mapping[int, Use] = {}
    ready = 0.0

    def __enter__(self) -> Counted:
        super().__enter__()
        type(self).before = self._asked()
        type(self).ready = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        type(self).after = self._asked()
        super().__exit__(*exception)

    def _asked(self) -> dict[int, Use]:
        calls: list[Call] = [(used, ())] * (CALLS_PER_WORKER * self._workers)
        return dict(answer for _, answer in self.run(calls))


def protect(scratch: Path, out: Path, workers: int | None, address: str) -> dict[str, Any]:
    """Seconds, bytes and memory of one run."""
    options: dict[str, Any] = {"threads": 1} if workers is None else {"ray": address, "workers": workers}
    _, before = used()
    Counted.before, Counted.after, Counted.ready = {}, {}, time.monotonic()
    ops.protect(scratch / "expert", base=scratch / "base", out=out, key=out.with_suffix(".key"), seed=SEED, **options)
    seconds = time.monotonic() - Counted.ready
    _, after = used()
    spent = {name: after[name] - before[name] for name in before}
    for worker, found in Counted.after.items():
        earlier = Counted.before[worker]
        for name in ("cpu_seconds", "bytes_read", "bytes_written"):
            spent[name] += found[name] - earlier[name]
    spent["peak_memory"] = max(use["peak_memory"] for use in Counted.after.values() or [after])
    return {"workers": workers, "wall_seconds": seconds, **spent}


def digest(folder: Path) -> str:
    """Of all files, manifest included."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--layers", type=int, default=16, help="16 are half a billion weights")
    parser.add_argument("--ray", default=LOCAL, metavar="ADDRESS", help="a cluster of this machine")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    scratch = given.scratch / "protect-on-ray"
    torch.set_num_threads(1)
    try:
        # In processes of their own, whose memory is not counted.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            models = [(scratch / name, given.layers, seed) for seed, name in enumerate(("base", "expert"))]
            sizes = pool.starmap(write_model, models)
        protection.RayPool = Counted  # type: ignore[misc]
        runs, digests = [], []
        for workers in (None, 1, 2):
            out = scratch / f"out-{workers}"
            runs.append(protect(scratch, out, workers, given.ray))
            digests.append(digest(out))
            print(json.dumps(runs[-1]), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    document = {
        "bytes": sizes[1],
        "are_equal": len(set(digests)) == 1,
        "load": os.getloadavg()[1],
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "runs": runs,
    }
    text = json.dumps(document, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
