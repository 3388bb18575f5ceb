"""From examples to a network's inputs, by the tokenizer or the image processor of its checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from unmergeable.data import DataSource, Example, class_number
from unmergeable.errors import BadInput
from unmergeable.network.load import encoded_texts, load_tokenizer
from unmergeable.optional import quiet


@dataclass(frozen=True)
class EncodedBatch:
    """Inputs of a network by name, each [examples, ...]; and class numbers, int64 [examples], or None."""

    inputs: Mapping[str, Tensor]
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def to(self, device: torch.device) -> EncodedBatch:
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return EncodedBatch(moved, None if self.labels is None else self.labels.to(device))

    def visible(self, values: Tensor) -> Tensor:
        """The rows of ``values`` [..., features] that the attention mask shows, [rows, features]: no padding."""
        mask = self.inputs.get("attention_mask")
        if mask is not None and values.dim() == 3 and values.shape[:2] == mask.shape:
            values = values[mask.bool().to(values.device)]
        return values.reshape(-1, values.shape[-1])

    def singles(self) -> Iterator[EncodedBatch]:
        """Its examples, each as a batch of one."""
        for number in range(len(self)):
            yield self.cut(slice(number, number + 1))

    def cut(self, examples: slice) -> EncodedBatch:
        """Some of its examples, without a copy."""
        inputs = {name: tensor[examples] for name, tensor in self.inputs.items()}
        return EncodedBatch(inputs, None if self.labels is None else self.labels[examples])


@dataclass(frozen=True)
class Encoder:
    """What a checkpoint folder says about inputs. Tokenizer and image processor are loaded when first needed.

    ``max_length`` is where texts are cut, in tokens. Code inside the folder is never run.
    """

    folder: Path
    max_length: int = 512

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Inputs of a batch, by name. Texts are padded to the longest.

        Raises:
            UsageError: transformers is not installed.
            BadInput: the folder has no tokenizer (or image processor), or the examples are of different kinds.
        """
        kinds = {_kind(example) for example in examples}
        if len(kinds) > 1:
            raise BadInput(f"{examples[0].origin}: {' and '.join(sorted(kinds))} in one batch; give one kind of data.")
        contents: list[Any] = [example.content for example in examples]
        kind = kinds.pop()
        if kind == "texts":
            encoded = encoded_texts(
                self._tokenizer,
                contents,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            return dict(encoded)
        if kind == "images":
            return dict(self._image_processor(contents, return_tensors="pt"))
        return _stack(examples)

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # any will do: the mask hides it
        return tokenizer

    @cached_property
    def _image_processor(self) -> Any:
        transformers = importlib.import_module("transformers")
        with quiet(transformers):
            try:
                return transformers.AutoImageProcessor.from_pretrained(
                    self.folder, trust_remote_code=False, local_files_only=True
                )
            except Exception as error:  # of a damaged file it raises whatever its own readers do
                raise BadInput(
                    f"{self.folder} holds no usable image processor ({next(iter(str(error).splitlines()), '')}); "
                    "give its pixel_values in an npz file instead."
                ) from None


@dataclass(frozen=True)
class EncodedData:
    """The batches of a data source for one network, the same in every pass.

    ``class_names`` turn labels into numbers; with None there are no labels.
    """

    source: DataSource
    encoder: Encoder
    batch_size: int
    class_names: Sequence[str] | None = None

    def __iter__(self) -> Iterator[EncodedBatch]:
        """Raises BadInput for data that cannot be read or encoded, or a label that is out of range."""
        examples = iter(self.source)
        while batch := list(islice(examples, self.batch_size)):
            labels = None
            if self.class_names is not None:
                labels = torch.tensor([class_number(example, self.class_names) for example in batch])
            yield EncodedBatch(self.encoder.encode(batch), labels)


Item = TypeVar("Item")


def grouped(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """The items in their order, as many in a group as ``limit`` allows; one that is larger alone is a group."""
    group: list[Item] = []
    total = 0
    for item in items:
        if group and total + size(item) > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def class_names_of(network: Any) -> Sequence[str]:
    """The classes a network tells apart, in the order of its outputs."""
    return ordered_names(network.config.id2label)


def ordered_names(id2label: Mapping[Any, str]) -> Sequence[str]:
    """The names of an ``id2label``, whose numbers are text in a ``config.json``."""
    return [id2label[number] for number in sorted(id2label, key=int)]


def endless(batches: Iterable[EncodedBatch]) -> Iterator[EncodedBatch]:
    """The batches over and over. Raises BadInput when there are none."""
    while True:
        is_empty = True
        for batch in batches:
            is_empty = False
            yield batch
        if is_empty:
            raise BadInput("no examples to learn from; give data that has some.")


def _kind(example: Example) -> str:
    if isinstance(example.content, str):
        return "texts"
    return "images" if isinstance(example.content, np.ndarray) else "ready inputs"


def _stack(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Ready inputs of a batch. Whole numbers are int64, as networks want their ids; fractions are float32."""
    rows: list[Any] = [example.content for example in examples]
    stacked = {}
    for name in rows[0]:
        array = np.stack([row[name] for row in rows])
        stacked[name] = torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
    return stacked
