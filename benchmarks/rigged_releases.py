"""Releases that protect nothing against the recoveries: how far from the base they are, before and after.

    python -m benchmarks.rigged_releases --base BASE --expert EXPERT --rider EXPERT --out RESULT.json [--demo FOLDER]

Every rewrite keeps the expert's function exactly (``unmergeable.evaluation.planted``): the six that an audit of earlier
versions took for perfect protections, more of the kind, and all at once. For each the script says how far the outputs
are from the expert's, how far the weights are from the base's, and what each recovery makes of it. Merges with the
free-rider's are compared without a task: how far what they put out is from what the merge with the unprotected expert
puts out, as a share of what the expert changes in that merge (``merge_gap``: 0 where the release is worth as much as
the expert, 1 and more where nothing is left of it). With the folder of ``unmergeable demo`` recovered models and merges
are scored, too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from unmergeable import ops
from unmergeable.attacks.block_regression.inputs import complete, drawn
from unmergeable.attacks.block_regression.recording import first_of
from unmergeable.checkpoint.source import TensorSource
from unmergeable.demo.data import load_animals, load_mnist
from unmergeable.demo.train import evaluate, prepare_pixels
from unmergeable.errors import BadInput, UsageError
from unmergeable.evaluation.planted import KINDS, planted
from unmergeable.network.load import load_network
from unmergeable.ops.opened import open_with_architecture
from unmergeable.tasks.heads import read_head

RELEASES: Mapping[str, tuple[str, ...]] = {
    "value bias against output bias": ("value_bias",),
    "norm bias against its readers": ("norm_bias",),
    "layer scale against its writer": ("layer_scale",),
    "queries and values x 2^100": ("scales",),
    "an idle block": ("idle_layer",),
    "key bias and what a LayerNorm cannot see": ("key_bias", "unseen_reading", "unseen_writing"),
    "norm gains against their readers": ("norm_gain",),
    "a layer as two": ("split_layer",),
    "wider feed-forwards": ("wider_feed_forwards",),
    "more heads": ("more_heads",),
    "output head apart": ("untied",),
    "every basis": ("gauge",),
    "all that a norm reads times one number": ("streams",),
    "hidden units turned round": ("turned_units",),
    "hidden units that never bend": ("saturated_units",),
    "everything": KINDS,
}

CHAINS: Mapping[str, tuple[str, ...]] = {
    "nearest_orbit": ("nearest_orbit",),
    "lossless_pruning, nearest_orbit": ("lossless_pruning", "nearest_orbit"),
    "block_regression": ("block_regression",),
}

COEFFICIENTS = (0.5, 0.7, 1.0)


@dataclass(frozen=True)
class Demo:
    """The tasks of the demo with their heads: what the expert knows, and what the free-rider's knows."""

    folder: Path
    rider: Path

    def scores(self, folder: Path) -> dict[str, float]:
        network = load_network(folder)
        return {
            task.name: evaluate(network, task.test, read_head(self.folder / f"{task.name}-head.safetensors"))
            for task in (load_mnist(seed=0), load_animals(seed=0))
        }

    def merged(self, base: Path, expert: Path, work: Path) -> dict[str, dict[str, float]]:
        """Scores of merges with the free-rider's expert, by coefficient."""
        found = {}
        for coefficient in COEFFICIENTS:
            out = work / "merged"
            shutil.rmtree(out, ignore_errors=True)
            experts = [(expert, coefficient), (self.rider, coefficient)]
            ops.merge(base=base, experts=experts, method="task_arithmetic", out=out)
            found[str(coefficient)] = self.scores(out)
        return found

    def write_inputs(self, path: Path) -> None:
        """Images of the free-rider's own task, without labels."""
        np.savez(path, pixel_values=prepare_pixels(load_animals(seed=0).train.images).numpy())


def write(source: TensorSource, beside: Path, out: Path) -> None:
    """A checkpoint in memory as a folder, with the small files of ``beside``."""
    out.mkdir()
    for path in beside.iterdir():
        if path.is_file() and path.suffix in {".json", ".txt", ".model"} and "index" not in path.name:
            shutil.copyfile(path, out / path.name)
    save_file({name: source.tensor(name) for name in source.names}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(dict(source.config), indent=1))


def releases(
    expert: Path, wanted: Mapping[str, tuple[str, ...]], work: Path, seed: int
) -> Iterator[tuple[str, tuple[str, ...], Path]]:
    """Every rewrite of those ``wanted`` that the family has: its name, what was done, its folder."""
    source, architecture = open_with_architecture(expert)
    for name, kinds in wanted.items():
        made = planted(source, architecture, seed, kinds)
        if made.kinds:
            out = work / "release"
            shutil.rmtree(out, ignore_errors=True)
            write(made.source, expert, out)
            yield name, made.kinds, out


@torch.no_grad()
def outputs(folder: Path) -> Tensor:
    """What a network puts out on inputs drawn at random, the same for every network of one family."""
    network = load_network(folder)
    drawn_inputs = complete(network, drawn(network, examples=8, seed=1))
    return torch.cat([first_of(network(**batch.inputs)).flatten() for batch in drawn_inputs])


def output_gap(first: Path, second: Path) -> float:
    """Relative distance of what two networks put out."""
    ours = outputs(first)
    return float((outputs(second) - ours).norm() / ours.norm())


class Rider:
    """A free-rider's expert of another task, and what it makes of releases by adding their updates to its own."""

    def __init__(self, base: Path, path: Path, expert: Path, work: Path) -> None:
        self._base, self._path, self._work = base, path, work
        self._with = {each: self._outputs(expert, each) for each in COEFFICIENTS}
        self._without = self._outputs(None, 1.0)

    def _outputs(self, release: Path | None, coefficient: float) -> Tensor:
        out = self._work / "merged"
        shutil.rmtree(out, ignore_errors=True)
        experts = [(self._path, 1.0)] + ([] if release is None else [(release, coefficient)])
        ops.merge(base=self._base, experts=experts, method="task_arithmetic", out=out)
        return outputs(out)

    def merge_gap(self, release: Path) -> dict[str, float | str]:
        """By coefficient: how far from merges with the expert, as a share of what the expert changes there."""
        found: dict[str, float | str] = {}
        for coefficient, wanted in self._with.items():
            try:
                away = (self._outputs(release, coefficient) - wanted).norm()
            except (BadInput, UsageError) as error:
                return {"refused": str(error)}
            found[str(coefficient)] = float(away / (wanted - self._without).norm())
        return found


def recovered(release: Path, base: Path, chain: tuple[str, ...], data: Path | None, work: Path) -> dict[str, Any]:
    """What a chain of recoveries reports, and its last folder under ``out``; or why it refuses."""
    current, reports, began = release, [], process_time()
    for number, method in enumerate(chain):
        out = work / f"recovered-{number}"
        shutil.rmtree(out, ignore_errors=True)
        examples = data if method == "block_regression" else None
        try:
            result = ops.recover(current, base=base, method=method, out=out, data=examples)
        except (BadInput, UsageError) as error:
            return {"refused": str(error)}
        current, report = out, result.to_json()
        reported = ("method", "distance_before", "distance_after", "confidence", "findings")
        reports.append({key: report[key] for key in reported})
    return {"cpu_seconds": process_time() - began, "steps": reports, "out": current}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--expert", type=Path, required=True)
    parser.add_argument("--rider", type=Path, help="a free-rider's expert of the same base")
    parser.add_argument("--demo", type=Path, help="the folder of `unmergeable demo`")
    parser.add_argument("--only", help="names of releases, separated by semicolons")
    parser.add_argument("--chains", help="recoveries to run, separated by semicolons; all by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    demo = None if options.demo is None else Demo(options.demo, options.rider or options.demo / "expert-animals")
    chains = {
        label: chain for label, chain in CHAINS.items() if not options.chains or label in options.chains.split(";")
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = None
        if demo is not None:
            data = work / "images.npz"
            demo.write_inputs(data)
            models = {"base": options.base, "expert": options.expert, "rider": demo.rider}
            rows += [{"model": name, "scores": demo.scores(path)} for name, path in models.items()]
            rows.append({"model": "expert", "merged": demo.merged(options.base, options.expert, work)})
        rider = None if options.rider is None else Rider(options.base, options.rider, options.expert, work)
        wanted = {name: RELEASES[name] for name in (options.only.split(";") if options.only else RELEASES)}
        for name, kinds, release in releases(options.expert, wanted, work, options.seed):
            row: dict[str, Any] = {"release": name, "kinds": kinds, "output_gap": output_gap(options.expert, release)}
            if rider is not None:
                row["merge_gap"] = rider.merge_gap(release)
            for label, chain in chains.items():
                report = recovered(release, options.base, chain, data, work)
                out = report.pop("out", None)
                if out is not None:
                    report["output_gap"] = output_gap(options.expert, out)
                    if rider is not None:
                        report["merge_gap"] = rider.merge_gap(out)
                    if demo is not None:
                        report["scores"] = demo.scores(out)
                        report["merged"] = demo.merged(options.base, out, work)
                row[label] = report
            rows.append(row)
            print(json.dumps(row), flush=True)
            options.out.write_text(json.dumps(rows, indent=1, default=str))


if __name__ == "__main__":
    main()
