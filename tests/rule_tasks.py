"""Small networks that have learnt something: a base, and two experts, each of a rule of its own over its own tokens.

A text is a token and what a rule makes of it, again and again: t, t + k, t + 2k, ... inside one half of the vocabulary.
The base knows k = 1 in both halves, the owner's expert k = 5 in the first, the free-rider's k = 7 in the second. An
encoder and a decoder read t and write the rest. So the base knows neither expert's rule, and a merge may know both.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import fine_tune
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task, accuracy, predict
from unmergeable.network.train import Schedule
from zoo import TOYS, VOCABULARY, random_network

FIRST = 3
HALF = (VOCABULARY - FIRST) // 2
LENGTH = 9
OWNER, RIDER = (0, 5), (1, 7)
"""Half of the vocabulary and step of each rule."""


def texts(half: int, step: int, *, count: int, seed: int) -> Tensor:
    """Texts of a rule, int64 [count, LENGTH]."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(HALF, (count, 1), generator=generator)
    return FIRST + half * HALF + (starts + step * torch.arange(LENGTH)) % HALF


def inputs_of(ids: Tensor, *, has_encoder: bool) -> dict[str, Tensor]:
    return {"input_ids": ids[:, :2], "decoder_input_ids": ids} if has_encoder else {"input_ids": ids}


def examples(rule: tuple[int, int], *, has_encoder: bool, count: int = 256, seed: int = 0) -> EncodedBatch:
    return EncodedBatch(inputs_of(texts(*rule, count=count, seed=seed), has_encoder=has_encoder))


@dataclass(frozen=True)
class Models:
    """Folders with ``base``, ``expert`` and ``rider``; files ``data.npz`` and ``generic.npz`` of the owner."""

    folder: Path
    has_encoder: bool

    def knows(self, model: Path, rule: tuple[int, int] = OWNER) -> float:
        """Accuracy on texts that nobody was trained on."""
        unseen = examples(rule, has_encoder=self.has_encoder, count=64, seed=99)
        return accuracy(load_network(model), Task("rule", [unseen]))


def learn(network: Any, data: EncodedBatch, *, steps: int, rate: float, seed: int = 0) -> Any:
    fine_tune(network, predict, data, Schedule(steps, rate), batch_size=32, seed=seed)
    return network


def joined(*batches: EncodedBatch) -> EncodedBatch:
    names = batches[0].inputs
    return EncodedBatch({name: torch.cat([batch.inputs[name] for batch in batches]) for name in names})


def write_models(folder: Path, toy: str, *, pretraining: int = 250, fine_tuning: int = 150) -> Models:
    """Train and save the three of a toy (:mod:`zoo`), on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _write_models(folder, toy, pretraining, fine_tuning)
    finally:
        torch.set_num_threads(threads)


def _write_models(folder: Path, toy: str, pretraining: int, fine_tuning: int) -> Models:
    has_encoder = "t5" in toy
    general = joined(*(examples((half, 1), has_encoder=has_encoder, seed=half) for half in (0, 1)))
    # Smaller than the zoo's weights, which are made not to be learnt from.
    network = learn(random_network(TOYS[toy], scale=0.5), general, steps=pretraining, rate=3e-3)
    network.save_pretrained(folder / "base")
    for name, rule in (("expert", OWNER), ("rider", RIDER)):
        data = examples(rule, has_encoder=has_encoder)
        learn(load_network(folder / "base"), data, steps=fine_tuning, rate=2e-3).save_pretrained(folder / name)
    write_data(folder / "data.npz", examples(OWNER, has_encoder=has_encoder).inputs)
    write_data(folder / "generic.npz", general.inputs)
    return Models(folder, has_encoder)


def write_data(file: Path, inputs: Mapping[str, Tensor]) -> None:
    np.savez(file, **{name: tensor.numpy() for name, tensor in inputs.items()})


def write_adapters(models: Models, *, steps: int = 200) -> None:
    """LoRA adapters of the base that know the two rules: ``expert-lora`` and ``rider-lora``."""
    peft = importlib.import_module("peft")
    for name, rule in (("expert-lora", OWNER), ("rider-lora", RIDER)):
        torch.manual_seed(0)
        configuration = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks transformers in a way that is going out of use
            adapted = peft.get_peft_model(load_network(models.folder / "base"), configuration)
        fine_tune(
            adapted.base_model.model,
            predict,
            examples(rule, has_encoder=models.has_encoder),
            Schedule(steps, 1e-2),
            batch_size=32,
            is_trained=lambda parameter: ".lora_" in parameter,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no name of a base on the hub is known
            adapted.save_pretrained(models.folder / name)
