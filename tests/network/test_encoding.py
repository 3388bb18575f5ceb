"""Examples become inputs as the checkpoint says: its tokenizer, its image processor, or the arrays as they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unmergeable.data import DataSource, Example
from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch, EncodedData, Encoder, class_names_of, endless, ordered_names
from unmergeable.network.load import load_tokenizer

WORDS = ["[PAD]", "[END]", "the", "cat", "sat", "on", "mat"]


def write_tokenizer(folder: Path, **special: str) -> Path:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[END]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def write_image_processor(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 8, "width": 8},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return folder


def texts(*lines: str) -> list[Example]:
    return [Example(line, None, f"x:{number}") for number, line in enumerate(lines, start=1)]


def test_texts_are_padded_to_the_longest_and_cut(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, pad_token="[PAD]", eos_token="[END]")
    encoded = Encoder(folder, max_length=4).encode(texts("the cat", "the cat sat on the mat"))
    assert encoded["input_ids"].tolist() == [[2, 3, 0, 0], [2, 3, 4, 5]]
    assert encoded["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_without_a_padding_token_the_last_one_pads_behind_the_mask(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, eos_token="[END]")
    encoded = Encoder(folder).encode(texts("the", "the cat"))
    assert encoded["input_ids"].tolist() == [[2, 1], [2, 3]]
    assert encoded["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_images_of_any_size_become_pixel_values(tmp_path: Path) -> None:
    white, black = np.full((5, 9, 3), 255, dtype=np.uint8), np.zeros((20, 10, 3), dtype=np.uint8)
    examples = [Example(image, None, "x") for image in (white, black)]
    encoded = Encoder(write_image_processor(tmp_path)).encode(examples)
    assert encoded["pixel_values"].shape == (2, 3, 8, 8)
    assert torch.equal(encoded["pixel_values"][0], torch.ones(3, 8, 8))
    assert torch.equal(encoded["pixel_values"][1], -torch.ones(3, 8, 8))


def test_ready_inputs_are_passed_on(tmp_path: Path) -> None:
    rows = [{"input_ids": np.array([1, 2], dtype=np.int32), "gain": np.array(0.5)} for _ in range(3)]
    encoded = Encoder(tmp_path).encode([Example(row, None, "x") for row in rows])
    assert encoded["input_ids"].dtype == torch.int64
    assert encoded["gain"].dtype == torch.float32
    assert encoded["gain"].shape == (3,)


def test_data_come_in_batches_that_repeat(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model", pad_token="[PAD]")
    path = tmp_path / "x.jsonl"
    rows = [{"text": word, "label": label} for word, label in zip(WORDS[2:], ("a", "b", "0", 1, "a"), strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = EncodedData(DataSource(path), Encoder(folder), 2, ["a", "b"])
    batches = list(data)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert [batch.labels.tolist() for batch in batches] == [[0, 1], [0, 1], [0]]  # type: ignore[union-attr]
    again = list(data)
    assert all(torch.equal(x.inputs["input_ids"], y.inputs["input_ids"]) for x, y in zip(batches, again, strict=True))
    assert all(batch.labels is None for batch in EncodedData(DataSource(path), Encoder(folder), 2))
    cycled = list(islice(endless(data), 5))
    assert torch.equal(cycled[3].inputs["input_ids"], batches[0].inputs["input_ids"])
    with pytest.raises(BadInput, match=r"x.jsonl:2: label 'b' is|x.jsonl:2: the label 'b' is none of"):
        list(EncodedData(DataSource(path), Encoder(folder), 2, ["a", "c"]))


def test_class_names_are_in_the_order_of_the_outputs() -> None:
    class Network:
        class config:  # noqa: N801
            id2label = {10: "k", 2: "c", 0: "a", 1: "b"}  # noqa: RUF012

    assert class_names_of(Network()) == ["a", "b", "c", "k"]
    assert ordered_names({"10": "k", "9": "j"}) == ["j", "k"]  # as JSON has them


def test_refuses(tmp_path: Path) -> None:
    image = Example(np.zeros((2, 2, 3), dtype=np.uint8), None, "a.png")
    with pytest.raises(BadInput, match=r"x:1: images and texts in one batch"):
        Encoder(tmp_path).encode([*texts("the"), image])
    with pytest.raises(BadInput, match=r"holds no usable tokenizer"):
        Encoder(tmp_path).encode(texts("the"))
    with pytest.raises(BadInput, match=r"holds no usable image processor .* give its pixel_values in an npz") as caught:
        Encoder(tmp_path).encode([image])
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="no examples to learn from"):
        next(endless([]))


def test_a_batch_may_move() -> None:
    batch = EncodedBatch({"x": torch.zeros(2, 3)}, torch.tensor([0, 1]))
    moved = batch.to(torch.device("meta"))
    assert moved.inputs["x"].is_meta
    assert moved.labels is not None
    assert moved.labels.is_meta
    assert EncodedBatch(batch.inputs).to(torch.device("meta")).labels is None


def test_a_damaged_tokenizer_is_refused_or_read_and_never_an_internal_error(tmp_path: Path) -> None:
    """Parts of its JSON are dropped, and replaced by what does not belong there."""
    folder = write_tokenizer(tmp_path / "model", pad_token="[PAD]")
    whole = json.loads((folder / "tokenizer.json").read_text())

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield path
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in children:
            yield from places(child, (*path, key))

    refused = 0
    for *parents, last in [path for path in places(whole) if path][:25]:
        for wrong in (None, -1, "x", [[]], {"type": "x"}):
            document = copy.deepcopy(whole)
            target = document
            for key in parents:
                target = target[key]
            target[last] = wrong
            (folder / "tokenizer.json").write_text(json.dumps(document))
            try:
                load_tokenizer(folder)
            except BadInput:
                refused += 1
    assert refused > 25, "the damage did not show"
