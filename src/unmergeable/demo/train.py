"""Two experts from one base, and how well any of their relatives does.

A task is scored as in zero-shot recognition: an image belongs to the class whose prototype its features point to.
The prototypes are averages of the *base's* features and never change, so they work as one head for the base, the
experts and every merge of them, and everything an expert learns is in the weights that are protected.

    feature(x) = mean over patches of the last hidden states
    logits(x)  = <feature(x) / |feature(x)|, prototype> / temperature
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.demo.data import Examples, Images, ImageTask
from unmergeable.errors import BadInput
from unmergeable.network.load import load_network
from unmergeable.network.save import write_network
from unmergeable.network.train import Batch, Schedule, shuffled_batches, train
from unmergeable.progress import Progress, silent

PIXELS = 42
"""Side of the image the network sees: 3 x 3 patches, the least that still tells the classes apart."""

CHANNEL_MEAN = (0.485, 0.456, 0.406)
CHANNEL_STD = (0.229, 0.224, 0.225)
"""Of the photographs the backbone was trained on."""

TEMPERATURE = 0.02
"""Prototypes of one network lie close together (cosines above 0.8); this spreads their differences over the softmax."""

BATCH_SIZE = 16
LEARNING_RATE = 2e-5
SCALING_COEFFICIENT = 0.6
"""Of both task vectors in the merge; chosen on validation images."""

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class PrototypeHead:
    """One unit vector for each class, float32 [classes, hidden_size]."""

    prototypes: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Features [count, hidden_size] to logits [count, classes]."""
        cosines = functional.normalize(features, dim=-1) @ self.prototypes.to(features).T
        return cosines / TEMPERATURE


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


@torch.no_grad()
def extract_features(
    backbone: nn.Module, images: Images, *, stage: str = "reading images", progress: Progress = silent
) -> Tensor:
    """Pooled features of many images, float32 [count, hidden_size] on the CPU."""
    device = next(backbone.parameters()).device
    parts = []
    for start in range(0, len(images), EVALUATION_BATCH):
        progress(stage, start, len(images), "images")
        pixels = prepare_pixels(images[start : start + EVALUATION_BATCH])
        parts.append(pooled_features(backbone, pixels.to(device)).float().cpu())
    progress(stage, len(images), len(images), "images")
    return torch.cat(parts)


def fit_prototypes(backbone: nn.Module, task: ImageTask, *, progress: Progress = silent) -> PrototypeHead:
    """The mean direction of each class over the training images."""
    stage = f"prototypes of {task.title}"
    directions = functional.normalize(
        extract_features(backbone, task.train.images, stage=stage, progress=progress), dim=-1
    )
    labels = torch.from_numpy(task.train.labels)
    means = [directions[labels == number].mean(dim=0) for number in range(len(task.class_names))]
    return PrototypeHead(functional.normalize(torch.stack(means), dim=-1))


def write_head(head: PrototypeHead, path: Path | str) -> None:
    """Keep a head beside the checkpoints it scores; a safetensors file of one tensor."""
    save_file({"prototypes": head.prototypes}, path)


def read_head(path: Path | str) -> PrototypeHead:
    """The head :func:`write_head` wrote.

    Raises:
        BadInput: there is no such file, or it is not a head.
    """
    try:
        return PrototypeHead(load_file(path)["prototypes"])
    except (OSError, SafetensorError, KeyError):
        raise BadInput(f"{path} is not a head of prototypes; run the demo again.") from None


def finetune_expert(
    base: Path | str,
    out: Path | str,
    task: ImageTask,
    head: PrototypeHead,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> list[float]:
    """Fine-tune the checkpoint ``base`` on a task and write the expert to ``out``, as a checkpoint like the base.

    One pass over the training images. The same seed and number of threads give the same expert.

    Returns:
        The training loss of each step.
    """
    backbone = load_network(base)
    images, labels = task.train.images, torch.from_numpy(task.train.labels)

    def batches() -> Iterator[Batch]:
        for chosen in shuffled_batches(len(images), BATCH_SIZE, seed):
            yield prepare_pixels(images[chosen.numpy()]), labels[chosen]

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        pixels, classes = batch
        return functional.cross_entropy(head.logits(pooled_features(network, pixels)), classes)

    losses = train(
        backbone,
        batches(),
        loss,
        Schedule(steps=len(images) // BATCH_SIZE, learning_rate=LEARNING_RATE),
        is_trained=_is_in_attention_or_mlp,
        seed=seed,
        stage=f"learning {task.title}",
        progress=progress,
    )
    write_network(backbone, out, config_from=base)
    return losses


def _is_in_attention_or_mlp(name: str) -> bool:
    """The linear maps of every block learn. Left as they are in the base: embeddings, norms and layer scales,

    which the features of both tasks pass through, and whose changes add up worst when experts are merged.
    """
    return ".attention." in name or ".mlp." in name


def evaluate(
    network: Any, examples: Examples, head: PrototypeHead, *, stage: str = "scoring", progress: Progress = silent
) -> float:
    """Fraction of the examples put in the right class, by a live backbone or the one in a checkpoint folder."""
    backbone = load_network(network) if isinstance(network, (str, Path)) else network
    features = extract_features(backbone, examples.images, stage=stage, progress=progress)
    return float((head.logits(features).argmax(dim=1).numpy() == examples.labels).mean())
