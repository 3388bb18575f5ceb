"""An audit by the standard attacker of a network it can be afforded for: a ViT of 0.2M weights, trained from scratch.

    pip install --no-deps -r requirements-demo.txt
    python -m benchmarks.real_experts.small_vit SCRATCH [--workers N] [--out benchmarks/results/small_vit_audit.json]

The base learns capitals of three alphabets, emoji and small digits, and from a few examples of each what digits,
clothes and animals are; its features carry the heads of all tasks, which never change. Three experts see thousands of
one task each. Every one of them is an owner's once, with the two others as free-riders: what is not the owner's was
never seen while a protection was trained. Eighteen hundred images of each task decide nothing but the score.

Prepares all this in SCRATCH/small_vit unless it is there, writes a plan for each owner, and runs ``unmergeable audit``
into SCRATCH/small_vit/audit-OWNER; started again it goes on where it was. Base and experts take five minutes, an owner
with four methods and two keys an hour and three quarters of a core or more. Attackers who train (``few_shot``,
``retrain``) are left out: their trainings take longer than all else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.real_experts import images
from benchmarks.real_experts.audited import audit_study, parser_of, told
from benchmarks.real_experts.experts import write_expert
from benchmarks.real_experts.made import made
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.demo.data import Examples, ImageTask, Sizes, load_animals, load_mnist
from unmergeable.demo.train import mean_directions, pooled_features
from unmergeable.network.load import load_network
from unmergeable.network.train import Batch, Schedule, shuffled_batches, train
from unmergeable.progress import Progress, silent
from unmergeable.tasks import FeatureHead, read_head, write_head

OWNERS = ("digits", "clothes", "animals")
BASE_TASKS = ("latin", "greek", "cyrillic", "emoji", "ucidigits")
SIZES = Sizes(train=2000, validation=600, test=2050)
ATTACKERS = 250
"""Of the test part, what a free-rider has labels of."""

SEEN_BY_BASE = 100
"""Examples of each owner's task that the base is trained on."""

BATCH_SIZE = 64
PRETRAINING = Schedule(steps=2500, learning_rate=1e-3, weight_decay=0.01)
FINETUNING = Schedule(steps=300, learning_rate=2e-4)
SHIFT = 2
"""Pixels by which training images move at most."""

TEMPERATURE = 0.1


def read_tasks(packages: Path) -> dict[str, ImageTask]:
    """All tasks by name; those of the owners in larger parts."""
    large = {
        "digits": load_mnist(sizes=SIZES),
        "clothes": images.load_fashion(packages, sizes=SIZES),
        "animals": load_animals(sizes=SIZES),
    }
    return large | {name: images.LOADERS[name](packages) for name in BASE_TASKS}


def pixels_of(examples: Examples) -> Tensor:
    """As the network reads them: float32 [count, 1, 28, 28] from -1 to 1."""
    return torch.from_numpy(np.ascontiguousarray(examples.images)).float().div(127.5).sub(1).unsqueeze(1)


def new_network() -> Any:
    """A ViT of four layers, with the weights transformers draws for it."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=images.SIDE,
        patch_size=7, num_channels=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTModel(config)


@dataclass
class Mixture:
    """Training examples of several tasks, whose classes follow each other."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def of(cls, tasks: Sequence[tuple[ImageTask, int | None]]) -> Mixture:
        pixels, labels, first = [], [], 0
        for task, count in tasks:
            pixels.append(pixels_of(task.train)[:count])
            labels.append(torch.from_numpy(task.train.labels)[:count] + first)
            first += len(task.class_names)
        return cls(torch.cat(pixels), torch.cat(labels))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Shuffled, each batch moved by some pixels."""
        generator = torch.Generator().manual_seed(seed)
        for chosen in shuffled_batches(len(self.labels), BATCH_SIZE, seed):
            moved = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
            yield self.pixels[chosen].roll(moved, (2, 3)), self.labels[chosen]


def write_base(folder: Path, tasks: Mapping[str, ImageTask], progress: Progress) -> dict[str, Any]:
    """Train the base and write it; returns its size."""
    network = new_network()
    mixture = Mixture.of([(task, SEEN_BY_BASE if name in OWNERS else None) for name, task in tasks.items()])
    shape = (int(mixture.labels.max()) + 1, network.config.hidden_size)
    classes = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    network.register_parameter("classes", classes)
    head = FeatureHead(classes, temperature=TEMPERATURE)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        pixels, labels = batch
        return functional.cross_entropy(head.logits(pooled_features(network, pixels)), labels)

    losses = train(network, mixture.batches(0), loss, PRETRAINING, stage="training the base", progress=progress)
    del network.classes
    network.save_pretrained(folder)
    return {
        "weights": sum(parameter.numel() for parameter in network.parameters()),
        "steps": PRETRAINING.steps,
        "loss": round(float(np.mean(losses[-50:])), 3),
    }


@torch.no_grad()
def prototypes(network: Any, task: ImageTask) -> FeatureHead:
    """The mean direction of each class over the training examples."""
    directions = functional.normalize(pooled_features(network, pixels_of(task.train)), dim=-1)
    weight = mean_directions(directions, torch.from_numpy(task.train.labels), len(task.class_names))
    return FeatureHead(weight, pooling="rest", temperature=TEMPERATURE)


def finetune(study: Path, task: ImageTask, name: str, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train the linear maps of the base on all of a task, and write it."""
    network = load_network(study / "base")
    head = read_head(study / f"{name}-head.safetensors")
    examples = Mixture.of([(task, None)])

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        pixels, labels = batch
        return functional.cross_entropy(head.logits(pooled_features(network, pixels)), labels)

    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    train(
        network, examples.batches(1), loss, FINETUNING, is_trained=lambda key: key.rpartition(".")[0] in linear,
        stage=f"training the expert for {name}", progress=progress,
    )  # fmt: skip
    write_expert(network, study / "base", folder)
    return {"examples": len(examples.labels), "steps": FINETUNING.steps}


def write_data(task: ImageTask, name: str, folder: Path) -> None:
    """What the expert was trained on, what the free-rider has labels of, to select on, and to judge by."""
    shares = {
        "train": task.train,
        "selection": task.validation,
        "judge": Examples(task.test.images[:-ATTACKERS], task.test.labels[:-ATTACKERS]),
        "attacker": Examples(task.test.images[-ATTACKERS:], task.test.labels[-ATTACKERS:]),
    }
    for share, examples in shares.items():
        np.savez(folder / f"{name}-{share}.npz", pixel_values=pixels_of(examples).numpy(), label=examples.labels)


def prepare(folder: Path, packages: Path, progress: Progress = silent) -> dict[str, Any]:
    """Base, experts and data, unless they are there; returns how they were made."""
    tasks = read_tasks(packages)
    facts = {"base": made(folder / "base", lambda partial: write_base(partial, tasks, progress))}
    network = load_network(folder / "base")
    for name in OWNERS:
        task = tasks[name]
        write_head(prototypes(network, task), folder / f"{name}-head.safetensors")
        write_data(task, name, folder)
        facts[name] = made(
            folder / f"expert-{name}",
            lambda partial, task=task, name=name: finetune(folder, task, name, partial, progress),
        )
    generic = torch.cat([pixels_of(tasks[name].train) for name in BASE_TASKS])
    np.savez(folder / "generic.npz", pixel_values=generic.numpy())
    return facts


TRAINED = {"steps": 1000, "learning_rate": 1e-3, "batch_size": 32}
"""So small a network takes larger and more steps than the defaults, which are for one of 22M weights."""


def plan(owner: str) -> dict[str, Any]:
    """The audit of an owner's protections, with paths that start beside base and experts."""
    data = {"data": f"{owner}-train.npz", "head": f"{owner}-head.safetensors"}
    return {
        "base": "base",
        "experts": [{"name": name, "path": f"expert-{name}", "task": name} for name in OWNERS],
        "protect": {
            "expert": owner,
            "methods": [
                "mergelock",
                "gauge",
                {"name": "collapse", "method": "collapse", "settings": TRAINED, "generic": "generic.npz", **data},
                {
                    "name": "collapse, held",
                    "method": "collapse",
                    "settings": {**TRAINED, "fidelity": 300},
                    "generic": "generic.npz",
                    **data,
                },
            ],
        },
        "attacker": "standard-1",
        "threat_models": ["off_the_shelf", "white_box", "black_box"],
        "connectivity": 0,
        "tasks": [
            {
                "name": name,
                "train": f"{name}-attacker.npz",
                "validation": f"{name}-selection.npz",
                "test": f"{name}-judge.npz",
                "head": f"{name}-head.safetensors",
                "batch_size": 300,
            }
            for name in OWNERS
        ],
    }


def main() -> None:
    """Prepare, audit, keep what is small."""
    parser = parser_of(__doc__)
    parser.add_argument("--owner", choices=OWNERS, action="append", help="all three without")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.scratch / "small_vit"
    folder.mkdir(parents=True, exist_ok=True)
    facts = prepare(folder, arguments.scratch / "packages", told(time.monotonic()))
    for owner in arguments.owner or OWNERS:
        out = arguments.out and arguments.out.with_name(f"small_vit_{owner}_audit.json")
        audit_study(plan(owner), folder, workers=arguments.workers, out=out, prepared=facts, name=owner)


if __name__ == "__main__":
    main()
