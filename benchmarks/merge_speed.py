"""How fast and how lean merging is, against mergekit and against a bare loop, in the same run on the same files.

    python benchmarks/merge_speed.py SCRATCH [--layers 22] [--width 2048] [--rounds 5] [--methods linear ties …]
    python benchmarks/merge_speed.py SCRATCH --plot benchmarks/results/merge_speed.json      (and print the table)

Builds three bf16 checkpoints of a Llama with 1.1 billion parameters (2.2 GB, 4 shards each; a base and two
fine-tunes) in SCRATCH, then alternates, for every method that both have:

    ours        ``unmergeable merge CONFIG.yaml``: journalled, every tensor checked to be finite, names and shapes
                verified, synced; the manifest has sizes and the hashes of headers
    checksums   the same with ``--checksums``: SHA-256 of every byte read and written, for one method (``linear``)
    mergekit    ``mergekit-yaml CONFIG.yaml`` with the same file: dtype float32, out_dtype bfloat16
    paper       ties only: ``unmergeable merge --method ties``, which ranks whole task vectors
    loop        one thread: read the three models, add them up in float32, round, write, fsync; nothing else
    hashing     the same loop with SHA-256 of every byte read and written, beside ``checksums``

Every way is a process of its own, measured from outside: CPU seconds (user and system, all threads) and wall time of
the whole command, and the same without its start-up, which is measured as well (importing what the command imports).
Peak memory is the largest ``RssAnon + RssShmem`` of ``/proc/PID/status``, sampled every 10 ms: what the process itself
allocated. Pages of mapped input files, which mergekit has and we do not, are not counted.

Peak memory is also measured on models with a third of the layers, where it should be the same.

Prints one JSON object: all measurements, the medians over rounds of each way, and the medians over rounds of ratios of
two ways in the same round. The checkpoints are in the page cache for all, if they fit. Everything is deleted at the end
unless ``--keep`` is given.
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
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

WIDTH, LAYERS, SHARDS = 2048, 22, 4
MODELS = ("base", "first", "second")
ONE_EXPERT = {"models": [{"model": "base"}, {"model": "first"}], "base_model": "base"}
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"models": [{"model": name, "parameters": {"weight": 1.0}} for name in MODELS]},
    "task_arithmetic": {"weight": 0.4},
    "slerp": {**ONE_EXPERT, "parameters": {"t": 0.4}},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
    "karcher": {"models": [{"model": name} for name in MODELS]},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "ties": {"weight": 0.5, "density": 0.2},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.15},
    "della_linear": {"weight": 0.5, "density": 0.5, "epsilon": 0.15},
    "breadcrumbs": {"weight": 0.5, "density": 0.9, "gamma": 0.01},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.9, "gamma": 0.01},
    "model_stock": {},
    "nearswap": {**ONE_EXPERT, "parameters": {"t": 0.001}},
    "arcee_fusion": ONE_EXPERT,
    "ram": {},
    "sce": {"select_topk": 0.5},
}
START_UPS = {
    "ours": "import unmergeable.ops, unmergeable.cli",
    "mergekit": "import mergekit.scripts.run_yaml",
    "loop": "import torch",
}


def config_of(layers: int, width: int) -> dict[str, Any]:
    """The ``config.json``: with the defaults that of TinyLlama, and of its proportions at any other width."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": width * 125 // 8,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def shapes(layers: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint."""
    config = config_of(layers, width)
    hidden, intermediate, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    key_value = hidden // 8
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        for name, shape in (
            ("input_layernorm", (hidden,)),
            ("mlp.down_proj", (hidden, intermediate)),
            ("mlp.gate_proj", (intermediate, hidden)),
            ("mlp.up_proj", (intermediate, hidden)),
            ("post_attention_layernorm", (hidden,)),
            ("self_attn.k_proj", (key_value, hidden)),
            ("self_attn.o_proj", (hidden, hidden)),
            ("self_attn.q_proj", (hidden, hidden)),
            ("self_attn.v_proj", (key_value, hidden)),
        ):
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def build(scratch: Path, layers: int, width: int) -> None:
    """Write the three checkpoints, one tensor in memory at a time."""
    import torch

    from unmergeable.checkpoint.header import TensorSpec
    from unmergeable.checkpoint.writer import ShardWriter

    specs = {name: TensorSpec("BF16", shape) for name, shape in shapes(layers, width)}
    total = sum(spec.nbytes for spec in specs.values())
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, spec in specs.items():
        if len(shards) < SHARDS and sum(s.nbytes for s in shards[-1].values()) >= total / SHARDS:
            shards.append({})
        shards[-1][name] = spec
    for number, model in enumerate(MODELS):
        folder = scratch / model
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_of(layers, width)))
        weight_map = {}
        for index, members in enumerate(shards, 1):
            shard = f"model-{index:05}-of-{len(shards):05}.safetensors"
            with ShardWriter(folder / shard, members.items(), {"format": "pt"}) as writer:
                for name, spec in members.items():
                    weight_map[name] = shard
                    weights = 0.02 * torch.randn(spec.shape, generator=generator_of(name))
                    if number:  # a fine-tune: a change of a tenth of the weights' size
                        weights += 0.002 * torch.randn(spec.shape, generator=generator_of(f"{model}.{name}"))
                    writer.write(name, weights.bfloat16())
                writer.finish()
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def generator_of(label: str) -> Any:
    """A torch generator for ``label``, the same in every process."""
    import hashlib

    import torch

    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "little"))


def write_config(scratch: Path, method: str) -> Path:
    """The mergekit configuration of one method, with absolute paths."""
    short = CONFIGS[method]
    document = dict(short) if "models" in short else task_vectors(short)
    document = json.loads(json.dumps(document))
    for model in document["models"]:
        model["model"] = str((scratch / model["model"]).absolute())
    if "base_model" in document:
        document["base_model"] = str((scratch / document["base_model"]).absolute())
    path = scratch / f"{method}.yaml"
    path.write_text(json.dumps({**document, "merge_method": method, "dtype": "float32", "out_dtype": "bfloat16"}))
    return path


def task_vectors(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"models": [{"model": "first"}, {"model": "second"}], "base_model": "base", "parameters": parameters}


def bare_loop(scratch: Path, out: Path, *, hashing: bool) -> None:
    """The least that a merge has to do: buffers allocated once, one thread, no journal, no checks."""
    import hashlib

    import torch

    from unmergeable.checkpoint.header import raw_header
    from unmergeable.checkpoint.reader import Checkpoint

    torch.set_num_threads(1)
    block = 1 << 17
    checkpoints = [Checkpoint.open(scratch / name) for name in MODELS]
    out.mkdir()
    digests = [hashlib.sha256() for _ in range(len(MODELS) + 1)]
    total, summand, rounded = torch.empty(block), torch.empty(block), torch.empty(block, dtype=torch.bfloat16)
    for shard in checkpoints[0].index.shards.values():
        assert shard.path is not None
        with (out / shard.name).open("wb", buffering=0) as file:
            file.write(raw_header(shard.path, shard.header_bytes))
            for name in shard.tensors:
                streams = [checkpoint.raw_chunks(name, 2 * block) for checkpoint in checkpoints]
                for chunks in zip(*streams, strict=True):
                    first, *others = (torch.frombuffer(chunk, dtype=torch.bfloat16) for chunk in chunks)
                    length = len(first)
                    total[:length].copy_(first)
                    for other in others:
                        total[:length].add_(summand[:length].copy_(other))
                    rounded[:length].copy_(total[:length].div_(3.0))
                    merged = rounded[:length].view(torch.uint8).numpy().data
                    file.write(merged)
                    if hashing:
                        for digest, data in zip(digests, (*chunks, merged), strict=True):
                            digest.update(data)
            os.fsync(file.fileno())


def commands(scratch: Path, method: str) -> dict[str, list[str]]:
    """Every way of merging with ``method``; the output folder is to be added."""
    config = str(write_config(scratch, method))
    ours = [sys.executable, "-m", "unmergeable", "merge"]
    ways = {
        "loop": [sys.executable, __file__, str(scratch), "--child"],
        "ours": [*ours, config, "--quiet", "--out"],
        "mergekit": [str(Path(sys.executable).parent / "mergekit-yaml"), config],
    }
    if method == "linear":
        ways["hashing"] = [sys.executable, __file__, str(scratch), "--hashing", "--child"]
        ways["checksums"] = [*ours, config, "--quiet", "--checksums", "--out"]
    if method == "ties":
        experts = [word for name in MODELS[1:] for word in ("--expert", f"{scratch / name}=0.5")]
        ways["paper"] = [*ours, "--method", "ties", "--base", str(scratch / "base"), *experts, "--quiet", "--out"]
    return ways


def measure(command: list[str]) -> dict[str, float]:
    """CPU seconds, wall seconds and peak anonymous memory of one process."""
    os.sync()
    began = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    peak = [0]
    sampler = threading.Thread(target=sample_memory, args=(child.pid, peak))
    sampler.start()
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - began
    sampler.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed: {said.decode()[-2000:]}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak_mb": peak[0] / 1e6}


def sample_memory(pid: int, peak: list[int]) -> None:
    """Keep the largest RssAnon + RssShmem of a process, until it is gone."""
    try:
        while True:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            own = [int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem"))]
            if not own:
                return  # a zombie has no memory left
            peak[0] = max(peak[0], sum(own))
            time.sleep(0.01)
    except (FileNotFoundError, ProcessLookupError):
        return


def summarise(rounds: list[dict[str, dict[str, float]]], start_ups: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Medians per way, with and without start-up, and how many times ours the others need, round by round."""
    full = [{way: with_work(way, measured, start_ups) for way, measured in entry.items()} for entry in rounds]
    ways = {way: {key: median(entry[way][key] for entry in full) for key in full[0][way]} for way in full[0]}

    def ratio(way: str, other: str, key: str) -> float:
        return median(entry[way][key] / entry[other][key] for entry in full)

    ratios = {f"mergekit_{key}": ratio("mergekit", "ours", key) for key in ("cpu", "wall", "work_cpu", "work_wall")}
    ratios["mergekit_peak"] = ratio("mergekit", "ours", "peak_mb")
    ratios |= {f"loop_{key}": ratio("ours", "loop", key) for key in ("work_cpu", "work_wall")}
    if "checksums" in ways:
        ratios |= {f"hashing_{key}": ratio("checksums", "hashing", key) for key in ("work_cpu", "work_wall")}
    return {"ways": {way: rounded(values) for way, values in ways.items()}, "ratios": rounded(ratios)}


def with_work(way: str, measured: dict[str, float], start_ups: dict[str, dict[str, float]]) -> dict[str, float]:
    """A measurement, and what is left of it without the start-up."""
    start_up = start_ups[{"paper": "ours", "checksums": "ours", "hashing": "loop"}.get(way, way)]
    return {**measured, **{f"work_{key}": measured[key] - start_up[key] for key in ("cpu", "wall")}}


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


def table(document: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "| method | CPU s | mergekit | times less | wall s | mergekit | times less | peak MB | mergekit | times less "
        "| CPU s of the work, of the loop's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, entry in document["methods"].items():
        ours, theirs, ratios = entry["ways"]["ours"], entry["ways"]["mergekit"], entry["ratios"]
        cells = [f"`{method}`"]
        for key, ratio, form in (
            ("cpu", "mergekit_cpu", "{:.1f}"),
            ("wall", "mergekit_wall", "{:.1f}"),
            ("peak_mb", "mergekit_peak", "{:.0f}"),
        ):
            cells += [form.format(ours[key]), form.format(theirs[key]), f"{ratios[ratio]:.1f}"]
        cells.append(f"{ours['work_cpu']:.2f}, {ratios['loop_work_cpu']:.2f} ×")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: Path) -> None:
    """Draw CPU seconds and memory of every method beside the JSON file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "merge_speed"
    import matplotlib.pyplot as plt

    methods = json.loads(results.read_text())["methods"]
    colours = {"mergekit": "#b3b3b3", "ours": "#1f77b4", "loop": "#2ca02c"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    for axis, key, title in zip(axes, ("cpu", "peak_mb"), ("CPU seconds", "peak memory, MB"), strict=True):
        for offset, (way, colour) in enumerate(colours.items()):
            positions = [number + 0.27 * (offset - 1) for number in range(len(methods))]
            heights = [entry["ways"][way][key] for entry in methods.values()]
            axis.bar(positions, heights, width=0.25, color=colour, label=way)
        axis.set_xticks(range(len(methods)), methods, rotation=40, ha="right")
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(results.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Build, measure in alternation, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder on the disk to measure; created if missing")
    parser.add_argument("--layers", type=int, default=LAYERS, help="22 of width 2048 make 1.1 billion parameters")
    parser.add_argument("--width", type=int, default=WIDTH, help="a multiple of 64; 15 layers of 512 make 100 MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints that were built, and reuse them")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="draw the results in this file, measure nothing")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hashing", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        bare_loop(arguments.scratch, arguments.child, hashing=arguments.hashing)
        return
    if arguments.plot:
        plot(arguments.plot)
        print(table(json.loads(arguments.plot.read_text())))
        return
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    scratch = built(arguments.scratch.absolute(), arguments.layers, arguments.width)
    small = built(arguments.scratch.absolute(), arguments.layers // 3, arguments.width)
    try:
        first = {"loop": commands(scratch, arguments.methods[0])["loop"]}
        measure_ways(scratch, first)  # and forgotten: it found the files in no cache, and the folder new
        starts = [
            {way: measure([sys.executable, "-c", statement]) for way, statement in START_UPS.items()}
            for _ in range(arguments.rounds)
        ]
        start_ups = {way: {key: median(s[way][key] for s in starts) for key in starts[0][way]} for way in START_UPS}
        methods: dict[str, Any] = {}
        for method in arguments.methods:
            rounds = [measure_ways(scratch, commands(scratch, method)) for _ in range(arguments.rounds)]
            methods[method] = {**summarise(rounds, start_ups), "rounds": rounds}
            third = {"ours": commands(small, method)["ours"]}
            methods[method]["peak_mb_of_a_third"] = measure_ways(small, third)["ours"]["peak_mb"]
        nbytes = sum(path.stat().st_size for path in (scratch / "base").iterdir())
    finally:
        if not arguments.keep:
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(small, ignore_errors=True)
    machine = {"processors": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()}
    size = {"bytes_per_model": nbytes, "layers": arguments.layers, "width": arguments.width}
    document = {**size, "start_up": start_ups, "methods": methods, "machine": machine}
    print(json.dumps(document, indent=2))


def built(scratch: Path, layers: int, width: int) -> Path:
    """The folder with the three checkpoints, built unless it is there."""
    folder = scratch / f"llama-{layers}-{width}"
    if not folder.exists():
        folder.mkdir()
        build(folder, layers, width)
    return folder


def measure_ways(scratch: Path, ways: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """One measurement of each way, one after the other; what they write is deleted."""
    results = {}
    for way, command in ways.items():
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            results[way] = measure([*command, str(Path(folder) / "out")])
            print(f"{command[-1]} {way}: {results[way]}", file=sys.stderr)
    return results


if __name__ == "__main__":
    main()
