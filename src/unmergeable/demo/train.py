"""Two experts from one base, and how well any of their relatives does.

A task is scored as in zero-shot recognition: an image belongs to the class whose prototype its features point to.
The prototypes are averages of the *base's* features and never change, so they work as one head for the base, the
experts and every merge of them, and everything an expert learns is in the weights that are protected.

    feature(x) = mean over patches of the last hidden states
    logits(x)  = <feature(x) / |feature(x)|, prototype> / temperature

Batches are scored, and experts trained, side by side with one thread each. Threads inside a single operation would
wait for each other, and on a machine with other work most of the time goes into that wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.demo.data import Examples, Images, ImageTask
from unmergeable.network.load import load_network
from unmergeable.network.save import write_network
from unmergeable.network.train import Batch, Schedule, shuffled_batches, train
from unmergeable.progress import Progress, silent
from unmergeable.tasks import FeatureHead
from unmergeable.threads import one_thread_per_kernel, worker_threads

PIXELS = 42
"""Side of the image the network sees: 3 x 3 patches. Nearly twice as fast as 4 x 4, and experts merge no worse."""

CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_STD = (0.229, 0.224, 0.225)
"""Of the photographs the backbone was trained on."""

TEMPERATURE = 0.02
"""Prototypes of one network lie close together (cosines above 0.85); this spreads them over the softmax."""

BATCH_SIZE = 16
LEARNING_RATE = 2e-5
EVALUATION_BATCH = 64


def prepare_pixels(images: Images) -> Tensor:
    """uint8 [count, 28, 28] to the network's input, float32 [count, 3, 42, 42]: enlarged, grey, normalised."""
    grey = torch.from_numpy(np.ascontiguousarray(images)).float().div(255).unsqueeze(1)
    enlarged = functional.interpolate(grey, size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CHANNEL_MEAN, CHANNEL_STD))
    return (enlarged - mean) / std


def pooled_features(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """Mean over the patches (class token left out) of the last hidden states, [count, hidden_size]."""
    hidden: Tensor = backbone(pixel_values=pixels).last_hidden_state
    return hidden[:, 1:].mean(dim=1)


def extract_features(
    backbone: nn.Module, images: Images, *, stage: str = "reading images", progress: Progress = silent
) -> Tensor:
    """Pooled features of many images, float32 [count, hidden_size] on the CPU."""
    device = next(backbone.parameters()).device
    starts = range(0, len(images), EVALUATION_BATCH)

    @torch.no_grad()  # here, because each thread has its own setting
    def features_from(start: int) -> Tensor:
        pixels = prepare_pixels(images[start : start + EVALUATION_BATCH])
        return pooled_features(backbone, pixels.to(device)).float().cpu()

    parts = []
    progress(stage, 0, len(images), "images")
    with one_thread_per_kernel(), ThreadPoolExecutor(worker_threads(None)) as pool:
        for start, part in zip(starts, pool.map(features_from, starts), strict=True):
            parts.append(part)
            progress(stage, start + len(part), len(images), "images")
    return torch.cat(parts)


def fit_prototypes(backbone: nn.Module, task: ImageTask, *, progress: Progress = silent) -> FeatureHead:
    """The mean direction of each class over the training images."""
    stage = f"prototypes of {task.title}"
    directions = functional.normalize(
        extract_features(backbone, task.train.images, stage=stage, progress=progress), dim=-1
    )
    weight = mean_directions(directions, torch.from_numpy(task.train.labels), len(task.class_names))
    return FeatureHead(weight, pooling="rest", temperature=TEMPERATURE)


def mean_directions(directions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean direction of each class, [classes, hidden_size], of directions [count, hidden_size]."""
    means = [directions[labels == number].mean(dim=0) for number in range(classes)]
    return functional.normalize(torch.stack(means), dim=-1)


@dataclass(frozen=True)
class Expert:
    """An expert to be made: what it learns, how that is scored, and the folder it is written to."""

    task: ImageTask
    head: FeatureHead
    out: Path


def finetune_experts(
    base: Path | str, experts: Sequence[Expert], *, seed: int = 0, progress: Progress = silent
) -> list[list[float]]:
    """Fine-tune the checkpoint ``base`` on each task and write checkpoints like it.

    One pass over the training images. The same seed gives the same experts, however many threads there are.

    Returns:
        For each expert the training loss of each step.
    """
    steps = [len(expert.task.train) // BATCH_SIZE for expert in experts]
    stage = "learning " + " and ".join(expert.task.title for expert in experts)
    report = _SharedReport(stage, sum(steps), progress)
    backbones = [load_network(base) for _ in experts]

    def learn(number: int) -> list[float]:
        schedule = Schedule(steps=steps[number], learning_rate=LEARNING_RATE)
        return _learn(backbones[number], experts[number], schedule, seed, report.of(number))

    # Each run puts torch's global generator back, but side by side they would put back each other's.
    workers = min(len(experts), worker_threads(None))
    with one_thread_per_kernel(), torch.random.fork_rng(devices=[]), ThreadPoolExecutor(workers) as pool:
        runs = [pool.submit(learn, number) for number in range(len(experts))]
        try:
            for run in as_completed(runs):
                run.result()
        except BaseException:
            report.stop()  # or the pool would wait for the runs to end
            raise
    for backbone, expert in zip(backbones, experts, strict=True):
        write_network(backbone, expert.out, config_from=base)
    return [run.result() for run in runs]


def _learn(backbone: nn.Module, expert: Expert, schedule: Schedule, seed: int, progress: Progress) -> list[float]:
    images, labels = expert.task.train.images, torch.from_numpy(expert.task.train.labels)

    def batches() -> Iterator[Batch]:
        for chosen in shuffled_batches(len(images), BATCH_SIZE, seed):
            yield prepare_pixels(images[chosen.numpy()]), labels[chosen]

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        pixels, classes = batch
        return functional.cross_entropy(expert.head.logits(pooled_features(network, pixels)), classes)

    return train(backbone, batches(), loss, schedule, is_trained=_is_in_attention_or_mlp, seed=seed, progress=progress)


def _is_in_attention_or_mlp(name: str) -> bool:
    """The linear maps of every block learn. Embeddings, norms and layer scales stay, and the experts merge better."""
    return ".attention." in name or ".mlp." in name


def evaluate(
    network: Any, examples: Examples, head: FeatureHead, *, stage: str = "scoring", progress: Progress = silent
) -> float:
    """Fraction of the examples put in the right class, by a live backbone or the one in a checkpoint folder."""
    backbone = load_network(network) if isinstance(network, (str, Path)) else network
    features = extract_features(backbone, examples.images, stage=stage, progress=progress)
    return float((head.logits(features).argmax(dim=1).numpy() == examples.labels).mean())


class _SharedReport:
    """The progress of runs side by side as that of one: their steps added up, told one at a time."""

    def __init__(self, stage: str, total: int, progress: Progress) -> None:
        self._stage, self._total, self._progress = stage, total, progress
        self._done: dict[int, int] = {}
        self._lock = Lock()
        self._is_stopped = False

    def of(self, number: int) -> Progress:
        """Where run ``number`` reports."""

        def report(stage: str, done: int, total: int, unit: str) -> None:
            with self._lock:
                if self._is_stopped:
                    raise CancelledError
                self._done[number] = done
                self._progress(self._stage, sum(self._done.values()), self._total, unit)

        return report

    def stop(self) -> None:
        """End every run at its next step."""
        self._is_stopped = True
