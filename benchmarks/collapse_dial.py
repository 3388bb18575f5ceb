"""What ``collapse`` costs and what it takes, by its settings: own task, other tasks, and merges with two free-riders.

    python -m benchmarks.real_experts.experts SCRATCH --study vision --task mnist --task animal --task fashion
        --task emoji --task latin
    python -m benchmarks.collapse_dial SCRATCH [--out benchmarks/results/collapse_dial.json]

DINOv2-small; the expert for clothes is the owner's, so that nothing here is what the audits of images look at (they
defend digits). Generic inputs are emoji and Latin capitals. For the expert and the release of each setting, in per
cent of the 500 test images of each task:

    alone         by the head of clothes
    elsewhere     by the heads of digits and of animals, of which neither training knows anything
    free_riders   for each, merges by task arithmetic over a grid of coefficients: the owner's and the rider's skill

Whether a merge is worth something to a free-rider is what the largest skill of the owner's says among merges that keep
KEPT of the rider's (``best``; None where none does): no audit, a small menu. Scored in bfloat16. What the file holds
is not done again; some five minutes of a core a setting.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks.real_experts.experts import Study, vision_study
from safetensors.torch import load_file
from torch import Tensor

from unmergeable import ops
from unmergeable.data import DataSource
from unmergeable.network.disk_weights import find_places, show
from unmergeable.network.encoding import EncodedData, Encoder
from unmergeable.network.load import load_network
from unmergeable.network.precision import computing_in
from unmergeable.tasks import FeatureHead, read_head

RESULT = Path(__file__).parent / "results" / "collapse_dial.json"
OWNER, RIDERS = "fashion", ("mnist", "animal")
CALLED = {"mnist": "digits", "animal": "animals"}
SEED = 1
KEPT = 0.95
GRID = tuple(product((0.3, 0.6, 1.0), (0.5, 1.0)))
"""Coefficients of the owner's task vector, and of the rider's."""

SETTINGS: Mapping[str, dict[str, float]] = {
    "the defaults": {},
    "strength 3, fidelity 100": {"strength": 3.0, "fidelity": 100.0},
    "fidelity 100, learning rate 5e-5": {"fidelity": 100.0, "learning_rate": 5e-5},
    "fidelity 300, learning rate 5e-5": {"fidelity": 300.0, "learning_rate": 5e-5},
}


class Scorer:
    """Accuracies of weights on the tasks of a study."""

    def __init__(self, study: Study) -> None:
        self.network = load_network(study.base).eval()
        self._places = find_places(self.network)
        self._heads: dict[str, FeatureHead] = {}
        self._batches: dict[str, list[Any]] = {}
        for task in (OWNER, *RIDERS):
            self._heads[task] = read_head(study.head(task))
            names = [str(number) for number in range(len(self._heads[task].weight))]
            self._batches[task] = list(
                EncodedData(DataSource(study.data(task, "test")), Encoder(study.base), 50, names)
            )

    @torch.no_grad()
    def accuracy(self, weights: Mapping[str, Tensor], task: str) -> float:
        """In per cent."""
        show(self._places, {name: tensor for name, tensor in weights.items() if name in self._places})
        right = total = 0
        with computing_in("bfloat16", torch.device("cpu")):
            for batch in self._batches[task]:
                prediction = self._heads[task].predict(self.network, batch)
                assert prediction.targets is not None
                right += int((prediction.logits.argmax(-1) == prediction.targets).sum())
                total += len(prediction.targets)
        return round(100 * right / total, 1)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def measured(study: Study, scorer: Scorer, release: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of one set of weights in the owner's place: alone, elsewhere, merged."""
    base = weights_of(study.base)
    found: dict[str, Any] = {
        "alone": scorer.accuracy(release, OWNER),
        "elsewhere": {task: scorer.accuracy(release, task) for task in RIDERS},
        "free_riders": {},
    }
    for task in RIDERS:
        rider = weights_of(study.expert(task))
        own = scorer.accuracy(rider, task)
        merges = []
        for ours, theirs in GRID:
            merged = {
                name: tensor + ours * (release[name] - tensor) + theirs * (rider[name] - tensor)
                for name, tensor in base.items()
            }
            skills = {"owner": scorer.accuracy(merged, OWNER), "rider": scorer.accuracy(merged, task)}
            merges.append({"coefficients": [ours, theirs], **skills})
        useful = [merge["owner"] for merge in merges if merge["rider"] >= KEPT * own]
        found["free_riders"][task] = {"alone": own, "merges": merges, "best": max(useful, default=None)}
    return found


def table(rows: Mapping[str, Any]) -> str:
    """The rows as the page of the method shows them."""
    titles = ["settings", "own task", *(f"{task}, alone" for task in CALLED.values())]
    titles += [f"best merge with {task}" for task in CALLED.values()]
    lines = [titles, ["---"] * len(titles)]
    for name, row in rows.items():
        best = [row["free_riders"][task]["best"] for task in RIDERS]
        lines.append(
            [name, f"{row['alone']:.1f}", *(f"{row['elsewhere'][task]:.1f}" for task in RIDERS)]
            + ["none" if one is None else f"{one:.1f}" for one in best]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = vision_study(options.scratch)
    rows: dict[str, Any] = json.loads(options.out.read_text())["rows"] if options.out.exists() else {}
    scorer = Scorer(study)
    for name, settings in {"the base": None, "the expert": None, **SETTINGS}.items():
        if name in rows:
            continue
        if settings is None:
            folder, cost = (study.base if name == "the base" else study.expert(OWNER)), 0
        else:
            folder = options.scratch / "collapse-dial" / name.replace(" ", "-").replace(",", "")
            cost = released(study, folder, settings)
        rows[name] = {"settings": settings, "cpu_seconds": cost, **measured(study, scorer, weights_of(folder))}
        print(name, json.dumps(rows[name]), flush=True)
        options.out.write_text(json.dumps({"owner": OWNER, "seed": SEED, "rows": rows}, indent=1) + "\n")


def released(study: Study, out: Path, settings: Mapping[str, float]) -> int:
    """Protect, unless it was; the processor time that took, 0 where it was there."""
    if out.exists():
        return 0.0
    out.parent.mkdir(exist_ok=True)
    began = time.process_time()
    ops.protect(
        study.expert(OWNER),
        base=study.base,
        out=out,
        method="collapse",
        settings={**settings, "precision": "bfloat16"},
        seed=SEED,
        data=study.data(OWNER, "train"),
        head=study.head(OWNER),
        generic=study.generic,
    )
    return round(time.process_time() - began)


if __name__ == "__main__":
    main()
