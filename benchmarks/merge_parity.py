"""Are our merges mergekit's? Weight by weight, on a real language model in bfloat16 and two real fine-tunes of it.

    python benchmarks/merge_parity.py CHECKPOINT SCRATCH [--out benchmarks/results/merge_parity.json] [--keep]
    python benchmarks/merge_parity.py --table benchmarks/results/merge_parity.json

CHECKPOINT is the folder of a causal language model, such as the SmolLM2-135M that ``real_language_model.py`` leaves in
its scratch folder. It is fine-tuned twice, briefly, on texts that come with Python: its reference manual, and the
source of ``argparse``. Then ``unmergeable merge CONFIG.yaml`` and the same with ``--backend mergekit``, which runs
``mergekit-yaml`` as an attacker would, merge the same files by the same configuration (dtype float32, out_dtype
bfloat16), and the two folders are compared.

Both compute in float32 and round once, in another order of operations. With ``size`` the sum of the magnitudes that a
merge adds up, k operations of each differ by at most ``k * eps32 * size`` in all, which may push them to neighbouring
numbers of the output dtype. A weight is within one rounding where

    |ours - theirs| <= eps_out * max(|ours|, |theirs|) + k * eps32 * size,    k = 20

Of the weights beyond it, those with a known reason are counted apart:

    equal magnitudes   task vectors of bfloat16 models have few distinct magnitudes. Of those equal to a threshold we
                       keep all (as the papers' code does); mergekit keeps an exact number, picked by an unstable sort.
                       How many weights lie at a threshold at all is counted as ``at_thresholds``
    undecided signs    the elected mass is smaller than its own rounding error
    rounded angle      ``model_stock`` in float64 confirms our weight: mergekit takes the cosine of a tensor in float32,
                       which in one of 28 million weights is off in the third digit

``dare_linear`` and ``della`` draw other masks than mergekit does. Their merges of one task vector, survivors not
rescaled, are compared per tensor as distributions: the fraction kept, and mean and variance of what is kept, as
differences in standard errors of which the largest over all tensors is reported. Of a few hundred normal deviates the
largest is about 3. (For equal masks, rescaled or not, the test-suite compares the two weight by weight.)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

State = Mapping[str, Tensor]

MODELS = ("base", "first", "second")
TEXTS = {"first": "pydoc_data.topics", "second": "argparse"}
STEPS, WINDOW, LEARNING_RATE = 12, 128, 1e-4
OPERATIONS = 20
EPS32 = torch.finfo(torch.float32).eps
WEIGHT, DENSITY, GAMMA = 0.4, 0.2, 0.01
CRUMBS_DENSITY = 0.9
DRAWN_DENSITY = 0.5
FEWEST_WEIGHTS = 1000
"""Tensors with fewer changed weights say little about a distribution."""

CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"models": [{"model": name, "parameters": {"weight": 1.0}} for name in MODELS]},
    "task_arithmetic": {"parameters": {"weight": WEIGHT}},
    "slerp": {
        "models": [{"model": "base"}, {"model": "first"}],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"value": 0.5}]},
    },
    "model_stock": {},
    "ties": {"parameters": {"weight": WEIGHT, "density": DENSITY}},
    "breadcrumbs": {"parameters": {"weight": WEIGHT, "density": CRUMBS_DENSITY, "gamma": GAMMA}},
}
DRAWN_CONFIGS: dict[str, dict[str, Any]] = {
    "dare_linear": {
        "models": [{"model": "first"}],
        "parameters": {"weight": 1.0, "density": DRAWN_DENSITY, "rescale": False},
    },
    # It takes two experts; the second adds nothing.
    "della": {
        "models": [
            {"model": "first", "parameters": {"weight": 1.0}},
            {"model": "second", "parameters": {"weight": 0.0}},
        ],
        "parameters": {"density": DRAWN_DENSITY, "epsilon": 0.2, "rescale": False, "normalize": False},
    },
}


# --- the models


def fine_tune(checkpoint: Path, module: str, out: Path) -> list[float]:
    """Train briefly on the text of a Python module; return the losses of the first and the last step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None, f"{module} comes with Python"
    text = Path(spec.origin).read_text(encoding="utf-8")[:60_000]
    tokens = AutoTokenizer.from_pretrained(checkpoint)(text, return_tensors="pt").input_ids[0]
    network = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        begin = int(torch.randint(0, len(tokens) - WINDOW, (1,), generator=generator))
        window = tokens[begin : begin + WINDOW][None]
        loss = network(input_ids=window, labels=window).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss.detach()), 3))
    network.to(torch.bfloat16).save_pretrained(out)
    return [losses[0], losses[-1]]


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def merge(scratch: Path, method: str, *, backend: str, out_dtype: str) -> dict[str, Tensor]:
    """Merge with the command line; the result's weights."""
    document = {"models": [{"model": "first"}, {"model": "second"}], **(CONFIGS | DRAWN_CONFIGS)[method]}
    if method != "linear":
        document["base_model"] = "base"
    config, out = scratch / f"{method}.yaml", scratch / f"{method}-{backend}"
    config.write_text(json.dumps({**document, "merge_method": method, "dtype": "float32", "out_dtype": out_dtype}))
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "unmergeable", "merge", str(config), "--backend", backend, "--out", str(out)]
    subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    merged = weights(out)
    shutil.rmtree(out)
    return merged


# --- weight by weight


@dataclass
class Counts:
    """Weights of one method. The last four are those beyond one rounding, by reason."""

    weights: int = 0
    differing: int = 0
    at_thresholds: int = 0
    equal_magnitudes: int = 0
    undecided_signs: int = 0
    rounded_angle: int = 0
    unexplained: int = 0

    @property
    def beyond(self) -> int:
        return self.equal_magnitudes + self.undecided_signs + self.rounded_angle + self.unexplained


def compare(method: str, ours: State, theirs: State, models: Mapping[str, State]) -> Counts:
    """Count over all tensors, which must be the same."""
    assert ours.keys() == theirs.keys()
    counts = Counts()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        base, *experts = (models[model][name].float() for model in MODELS)
        tasks = [expert - base for expert in experts]
        one, other = ours[name].double(), expected.double()
        size = base.abs().double() + sum(task.abs().double() for task in tasks)
        eps = torch.finfo(expected.dtype).eps
        beyond = (one - other).abs() > eps * torch.maximum(one.abs(), other.abs()) + OPERATIONS * EPS32 * size
        at_thresholds = equal_magnitudes(method, tasks)
        equal = beyond & at_thresholds
        undecided = beyond & ~equal & undecided_signs(method, tasks)
        if method == "model_stock" and bool(beyond.any()):
            exact = model_stock(base.double(), [task.double() for task in tasks])
            angle = beyond & ((one - exact).abs() <= eps * exact.abs() / 2 + OPERATIONS * EPS32 * size)
        else:
            angle = torch.zeros_like(beyond)
        counts.weights += one.numel()
        counts.differing += int((one != other).sum())
        counts.at_thresholds += int(at_thresholds.sum())
        counts.equal_magnitudes += int(equal.sum())
        counts.undecided_signs += int(undecided.sum())
        counts.rounded_angle += int(angle.sum())
        counts.unexplained += int((beyond & ~equal & ~undecided & ~angle).sum())
    return counts


def threshold_ranks(method: str, size: int) -> list[int]:
    """The ranks (1 = largest) at which a method cuts the magnitudes of a tensor, as mergekit counts them."""
    if method == "ties":
        return [max(1, int(DENSITY * size))]
    if method == "breadcrumbs":
        kept = int(CRUMBS_DENSITY * size)
        outliers = min(int(GAMMA * size), size - kept)
        return [outliers, outliers + 1, outliers + kept]
    return []


def equal_magnitudes(method: str, tasks: list[Tensor]) -> Tensor:
    """Where a task vector has a magnitude at a threshold that it has elsewhere too."""
    at = torch.zeros(tasks[0].shape, dtype=torch.bool)
    for task in tasks:
        magnitudes = task.abs()
        for rank in threshold_ranks(method, task.numel()):
            if 1 <= rank <= task.numel():
                threshold = magnitudes.reshape(-1).kthvalue(task.numel() - rank + 1).values
                equal = (magnitudes == threshold) & (task != 0)  # nothing hangs on keeping a 0
                at |= equal & bool(equal.sum() > 1)
    return at


def undecided_signs(method: str, tasks: list[Tensor]) -> Tensor:
    """Where the sign that ``ties`` elects hangs on the rounding of its mass."""
    if method != "ties":
        return torch.zeros(tasks[0].shape, dtype=torch.bool)
    mass = sum(tasks[1:], tasks[0]).abs()
    return mass <= 4 * EPS32 * sum(task.abs() for task in tasks)


def model_stock(base: Tensor, tasks: list[Tensor]) -> Tensor:
    """The merge of two task vectors, in float64."""
    one, other = tasks
    cosine = float((one * other).sum() / (one.norm() * other.norm()))
    return base + 2 * cosine / (1 + cosine) * (one + other) / 2


# --- as distributions


def deviations(ours: State, theirs: State, base: State, expert: State) -> dict[str, float]:
    """The largest deviation over all tensors of each statistic, in standard errors of a difference of two."""
    largest = {"kept": 0.0, "mean": 0.0, "variance": 0.0}
    tensors = 0
    for name in theirs:
        task = expert[name].float() - base[name].float()
        changed = task != 0
        if int(changed.sum()) < FEWEST_WEIGHTS:
            continue
        tensors += 1
        one, other = (moments((merged[name].float() - base[name].float())[changed]) for merged in (ours, theirs))
        errors = zip(one.statistics(), other.statistics(), one.errors(), other.errors(), strict=True)
        for key, (mine, their, my_error, their_error) in zip(largest, errors, strict=True):
            largest[key] = max(largest[key], abs(mine - their) / sqrt(my_error**2 + their_error**2))
    return {"tensors": tensors, **{key: round(value, 2) for key, value in largest.items()}}


@dataclass(frozen=True)
class Moments:
    """Of a thinned task vector of ``size`` weights: the fraction kept, and four moments of what is kept."""

    size: int
    kept: float
    mean: float
    variance: float
    fourth: float

    def statistics(self) -> tuple[float, float, float]:
        return self.kept, self.mean, self.variance

    def errors(self) -> Iterator[float]:
        """Their standard errors."""
        count = self.kept * self.size
        yield sqrt(self.kept * (1 - self.kept) / self.size)
        yield sqrt(self.variance / count)
        yield sqrt(max(0.0, self.fourth - self.variance**2) / count)


def moments(thinned: Tensor) -> Moments:
    """Of the entries of a thinned task vector, dropped ones being 0."""
    kept = thinned[thinned != 0].double()
    centred = kept - kept.mean()
    return Moments(
        size=thinned.numel(),
        kept=len(kept) / thinned.numel(),
        mean=float(kept.mean()),
        variance=float(centred.square().mean()),
        fourth=float(centred.square().square().mean()),
    )


# --- the run


def run(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Fine-tune, merge, compare."""
    shutil.copytree(checkpoint, scratch / "base", dirs_exist_ok=True)
    losses = {name: fine_tune(checkpoint, module, scratch / name) for name, module in TEXTS.items()}
    models = {name: weights(scratch / name) for name in MODELS}
    methods = {}
    for method in CONFIGS:
        ours, theirs = (merge(scratch, method, backend=way, out_dtype="bfloat16") for way in ("own", "mergekit"))
        counts = compare(method, ours, theirs, models)
        methods[method] = {**vars(counts), "beyond_one_rounding": counts.beyond}
        print(f"{method}: {methods[method]}", file=sys.stderr)
    drawn = {}
    for method in DRAWN_CONFIGS:
        ours, theirs = (merge(scratch, method, backend=way, out_dtype="float32") for way in ("own", "mergekit"))
        drawn[method] = deviations(ours, theirs, models["base"], models["first"])
        print(f"{method}: {drawn[method]}", file=sys.stderr)
    task_sizes = {
        name: sum(int((models[name][key] != tensor).sum()) for key, tensor in models["base"].items())
        for name in MODELS[1:]
    }
    return {
        "checkpoint": json.loads((checkpoint / "config.json").read_text())["model_type"],
        "weights": sum(tensor.numel() for tensor in models["base"].values()),
        "fine_tunes": {
            name: {"text": TEXTS[name], "losses": losses[name], "changed": task_sizes[name]} for name in TEXTS
        },
        "methods": methods,
        "drawn": drawn,
        "versions": {name: importlib.metadata.version(name) for name in ("mergekit", "torch", "transformers")},
        "machine": platform.machine(),
    }


def table(document: Mapping[str, Any]) -> str:
    """The two tables in Markdown."""
    lines = [
        "| method | weights | differing | beyond one rounding | of these at equal magnitudes (of all such) "
        "| undecided signs | rounded angle | unexplained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, its in document["methods"].items():
        cells = [f"{its[key]:,}" for key in ("weights", "differing", "beyond_one_rounding")]
        cells.append(f"{its['equal_magnitudes']:,} ({its['at_thresholds']:,})")
        cells += [f"{its[key]:,}" for key in ("undecided_signs", "rounded_angle", "unexplained")]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    lines += ["", "| method | tensors | fraction kept | mean | variance |", "|---|---|---|---|---|"]
    for method, its in document["drawn"].items():
        lines.append(f"| `{method}` | " + " | ".join(f"{its[key]:g}" for key in its) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run, or print the tables of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder of a causal language model")
    parser.add_argument("scratch", type=Path, nargs="?", help="a folder for the fine-tunes; created if missing")
    parser.add_argument("--out", type=Path, help="write the result here; printed if not given")
    parser.add_argument("--keep", action="store_true", help="keep the fine-tunes")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the tables of this result, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    if arguments.checkpoint is None or arguments.scratch is None:
        parser.error("give CHECKPOINT and SCRATCH, or --table.")
    torch.set_num_threads(1)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    document = run(arguments.checkpoint, arguments.scratch)
    if not arguments.keep:
        for name in MODELS:
            shutil.rmtree(arguments.scratch / name)
    text = json.dumps(document, indent=2) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
