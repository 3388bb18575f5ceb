"""What each command costs: CPU seconds, memory and disk, on Llamas of random weights in bfloat16.

    python benchmarks/command_cost.py SCRATCH [--sizes 0.3 1.1]

Builds a base and a fine-tune of it (task vector of 5 %) in SCRATCH, and runs the commands one after another, each as a
user would, in a process of its own with one thread. Prints one JSON object: by size in billions of weights and by
command CPU and wall seconds of the whole process, its peak resident memory, and the bytes that it left on the disk.
Everything is deleted at the end. 16 GB of disk for 1.1 billion weights.
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
from collections.abc import Mapping
from pathlib import Path

TASK_VECTOR = 0.05

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size
Shape = tuple[int, int, int, int, int, int]
SHAPES: Mapping[str, Shape] = {"0.3": (1024, 4096, 16, 16, 8, 32000), "1.1": (2048, 5632, 22, 32, 4, 32000)}
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "protect mergelock": ("protect", "expert", "--base", "base", "--method", "mergelock", "--out", "locked"),
    "protect": ("protect", "expert", "--base", "base", "--out", "release", "--key", "release.key"),
    "verify --manifest": ("verify", "release", "--manifest"),
    "restore": ("restore", "release", "--key", "release.key", "--out", "restored"),
    "merge linear": (
        *("merge", "--base", "base", "--expert", "release=0.5", "--expert", "expert=0.5"),
        *("--method", "linear", "--out", "merged"),
    ),
    "recover nearest_orbit": (
        *("recover", "release", "--base", "base", "--method", "nearest_orbit", "--out", "recovered"),
    ),
}


def write_model(folder: Path, shape: Shape, task_vector: float) -> None:
    """The base, and with a ``task_vector`` other than 0 a fine-tune of it."""
    import torch
    from safetensors.torch import save_file

    hidden, intermediate, layers, heads, key_value_heads, vocabulary = shape
    key_value = hidden // heads * key_value_heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    ends = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    names = {**ends, **{f"model.layers.{n}.{name}": size for n in range(layers) for name, size in matrices.items()}}
    base, change = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    tensors = {}
    for name, size in names.items():
        weight = 0.02 * torch.randn(size, generator=base)
        if task_vector:
            weight += 0.02 * task_vector * torch.randn(size, generator=change)
        tensors[f"{name}.weight"] = weight.bfloat16()
    norms = [
        f"model.layers.{n}.{name}" for n in range(layers) for name in ("input_layernorm", "post_attention_layernorm")
    ]
    tensors |= {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in (*norms, "model.norm")}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def measured(words: tuple[str, ...], place: Path) -> dict[str, float]:
    """One command in a process of its own."""
    before = set(place.iterdir())
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    threads = () if "--manifest" in words else ("--threads", "1")
    child = subprocess.Popen(
        [sys.executable, "-m", "unmergeable", *words, *threads, "--quiet"],
        cwd=place,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(words)} failed with status {child.returncode}")
    written = [file for made in set(place.iterdir()) - before for file in (made, *made.rglob("*")) if file.is_file()]
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "peak_rss_mb": round(usage.ru_maxrss * 1024 / 1e6),
        "written_mb": round(sum(file.stat().st_size for file in written) / 1e6),
    }


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder to be made")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    results = {}
    for size in arguments.sizes:
        place = arguments.scratch / size
        try:
            write_model(place / "base", SHAPES[size], 0.0)
            write_model(place / "expert", SHAPES[size], TASK_VECTOR)
            weights = (place / "expert" / "model.safetensors").stat().st_size // 2
            costs = {name: measured(words, place) for name, words in COMMANDS.items()}
            results[size] = {"weights": weights, "commands": costs}
            print(size, json.dumps(costs), file=sys.stderr)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    machine = {"processors": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()[0]}
    print(json.dumps({"sizes": results, "threads": 1, "machine": machine}, indent=2))


if __name__ == "__main__":
    main()
