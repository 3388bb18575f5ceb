"""``text_to_image``: a diffusion network paints a prompt, and another network says how well.

    measure = classifier   credit: share of the images that a classifier gives the label of the record
                           loss:   its cross-entropy, the mean of the images
    measure = clip         credit: cosine of image and prompt in CLIP's space, not below 0, the mean of the images
                           loss:   1 - cosine (CLIPScore, Hessel et al. 2021, without its factor of 2.5)

The network takes its place in a pipeline, whose other parts (text encoder, autoencoder, scheduler) stay as they are.
The noise each image starts from belongs to its record and its number, so all networks start from the same. Records at
one place of two files start from the same too; where these repeat a prompt, they paint the same image twice, and a
selection on one file would be tested on itself. A number of their own, under ``noise``, keeps them apart.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from unmergeable.data import DataSource, Example, Fields, class_number
from unmergeable.errors import BadInput, UsageError, first_line
from unmergeable.network.encoding import EncodedBatch, Encoder, class_names_of
from unmergeable.network.load import load_network, load_tokenizer
from unmergeable.network.tasks import device_of, predict
from unmergeable.optional import optional_package, quiet
from unmergeable.randomness import Stream
from unmergeable.tasks.clip_head import text_directions
from unmergeable.tasks.heads import image_features
from unmergeable.tasks.task_kind import Scores, TaskData, TaskKind

Measure = Literal["classifier", "clip"]


@dataclass(frozen=True)
class TextToImage(TaskKind):
    """Settings.

    Attributes:
        pipeline: folder of a diffusers pipeline, of which the network is one part.
        measure, measured_by: how images are measured, and the folder of the classifier or CLIP model that does it.
        prompt, label: what these fields are called in the data; labels are for classifiers.
        noise: the field with the number of a record's noise; if empty, that is the record's place, the first is 0.
        images: of each prompt.
        steps: of the scheduler.
        guidance: the scale of classifier-free guidance; 1 for none.
        seed: of the noise.
    """

    name: ClassVar[str] = "text_to_image"
    paths: ClassVar[tuple[str, ...]] = ("pipeline", "measured_by")
    pipeline: str = ""
    measure: Measure = "classifier"
    measured_by: str = ""
    prompt: str = "prompt"
    label: str = "label"
    noise: str = ""
    images: int = 1
    steps: int = 20
    guidance: float = 7.5
    seed: int = 0

    def validate(self) -> None:
        for name in self.paths:
            if not getattr(self, name):
                raise UsageError(f"text_to_image: {name} is missing; give the folder.")
        if min(self.images, self.steps) < 1 or self.guidance < 1:
            raise UsageError(
                f"images={self.images}, steps={self.steps}, guidance={self.guidance}: each must be at least 1."
            )

    @property
    def fields(self) -> Fields:
        return Fields(text=self.prompt, label=self.label)

    def scorer(self, data: TaskData, network: Any) -> PaintedPrompts:
        """Loads the pipeline and what measures its images.

        Raises:
            UsageError: diffusers is not installed.
            BadInput: the network is no part of the pipeline, or a record has no prompt, no label that is a class, or
                no number of its noise.
        """
        source = replace(data.source, fields=self.fields)
        pipeline, part = _pipeline(Path(self.pipeline), network)
        examples = _prompts(source)
        noises = [_noise(example, self.noise, place) for place, example in enumerate(examples)]
        make = _by_classifier if self.measure == "classifier" else _by_clip
        measures = make(Path(self.measured_by), examples)
        return PaintedPrompts(self, pipeline, part, examples, noises, measures, data.batch_size)


ImageMeasure = Callable[[Sequence[Example]], tuple[Tensor, Tensor]]
"""Images of one record, to credits and losses: both float64 [images]."""


@dataclass(frozen=True)
class PaintedPrompts:
    """Prompts, the numbers of their noise, the pipeline that paints them with the network as its ``part``, and what
    measures the images of each."""

    settings: TextToImage
    pipeline: Any
    part: str
    examples: Sequence[Example]
    noises: Sequence[int]
    measures: Sequence[ImageMeasure]
    batch_size: int

    def __len__(self) -> int:
        return len(self.examples)

    def only(self, start: int, stop: int) -> PaintedPrompts:
        chosen = slice(start, stop)
        return replace(self, examples=self.examples[chosen], noises=self.noises[chosen], measures=self.measures[chosen])

    def credits(self, network: Any) -> Scores:
        """What the images are worth, the mean over those of a prompt."""
        return self._measured(network, 0)

    def losses(self, network: Any) -> Scores:
        """What they lack."""
        return self._measured(network, 1)

    @torch.no_grad()
    def _measured(self, network: Any, which: int) -> Scores:
        count = self.settings.images
        images = self._painted(network)
        return np.array(
            [
                float(measure(images[number * count : (number + 1) * count])[which].mean())
                for number, measure in enumerate(self.measures)
            ]
        )

    def _painted(self, network: Any) -> list[Example]:
        """The images of all prompts, those of one prompt side by side."""
        settings = self.settings
        self.pipeline.register_modules(**{self.part: network})
        self.pipeline.to(device_of(network))
        noise = Stream.from_seed(settings.seed)
        wanted = [(number, copy) for number in range(len(self.examples)) for copy in range(settings.images)]
        painted: list[Example] = []
        for start in range(0, len(wanted), self.batch_size):
            chosen = wanted[start : start + self.batch_size]
            with quiet(importlib.import_module("diffusers")):
                images = self.pipeline(
                    prompt=[self.examples[number].content for number, _ in chosen],
                    generator=[_generator(noise.child(f"{self.noises[number]}.{copy}")) for number, copy in chosen],
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance,
                    output_type="np",
                ).images
            painted += [
                Example((image * 255).round().clip(0, 255).astype(np.uint8), None, self.examples[number].origin)
                for image, (number, _) in zip(images, chosen, strict=True)
            ]
        return painted


def _generator(stream: Stream) -> torch.Generator:
    """On the CPU, so that the noise is the same on every machine."""
    return torch.Generator().manual_seed(int(stream.uniform(1)[0] * 2**53))


def _pipeline(folder: Path, network: Any) -> tuple[Any, str]:
    """The pipeline in a folder with the network in it, and what it is called there."""
    diffusers = optional_package("diffusers", "diffusion")
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise BadInput(f"{folder} holds no pipeline with a model_index.json; give the folder of one.") from None
    kind = type(network).__name__
    parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[-1] == kind]
    if len(parts) != 1:
        raise BadInput(f"{folder}/model_index.json: {len(parts)} parts are a {kind}; the network must be one of them.")
    given = {parts[0]: network} | {name: None for name in ("safety_checker",) if name in index}
    with quiet(diffusers):
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, **given
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{folder} does not load as a pipeline ({first_line(error)}); check that it is whole."
            ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, parts[0]


def _prompts(source: DataSource) -> list[Example]:
    examples = list(source)
    for example in examples:
        if not isinstance(example.content, str):
            raise BadInput(f"{example.origin}: no text under {source.fields.text!r}; there is nothing to paint.")
    return examples


def _noise(example: Example, name: str, place: int) -> int:
    if not name:
        return place
    value = example.record.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadInput(f"{example.origin}: {name!r} is {value!r}; the number of its noise must be a whole number.")
    return value


def _by_classifier(folder: Path, prompts: Sequence[Example]) -> list[ImageMeasure]:
    classifier, encoder = load_network(folder), Encoder(folder)
    names = class_names_of(classifier)

    def measure(images: Sequence[Example], *, label: int) -> tuple[Tensor, Tensor]:
        labels = torch.full((len(images),), label)
        logits = predict(classifier, EncodedBatch(encoder.encode(images), labels)).logits.double()
        return (logits.argmax(dim=-1) == labels).double(), functional.cross_entropy(logits, labels, reduction="none")

    return [partial(measure, label=class_number(prompt, names)) for prompt in prompts]


def _by_clip(folder: Path, prompts: Sequence[Example]) -> list[ImageMeasure]:
    clip, encoder, tokenizer = load_network(folder), Encoder(folder), load_tokenizer(folder)
    if not hasattr(clip, "get_text_features"):
        raise BadInput(f"{folder} holds a {type(clip).__name__}, not a CLIP model; give one in measured_by.")

    def measure(images: Sequence[Example], *, prompt: str) -> tuple[Tensor, Tensor]:
        text = text_directions(clip, tokenizer, [prompt]).double()
        found = image_features(clip, EncodedBatch(encoder.encode(images))).double()
        cosines = functional.cosine_similarity(found, text)
        return cosines.clamp(min=0, max=1), 1 - cosines

    return [partial(measure, prompt=str(prompt.content)) for prompt in prompts]
