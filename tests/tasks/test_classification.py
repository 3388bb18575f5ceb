"""Classes by the network itself, by a head, and by what a CLIP text tower says about their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.parts import require_parts
from tasks.speakers import ids_of, task_data, write_speaker
from unmergeable.errors import BadInput, UsageError
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.load import load_network
from unmergeable.settings import configure
from unmergeable.tasks import Classification, FeatureHead, TaskData, clip_head, write_head
from zoo import TOYS, write_toy

NAMES = ("cat", "dog", "bird")
TEMPLATES = ("a photo of a {}.", "{}!")


def write_images(path: Path, labels: list[Any], **names: str) -> Path:
    pixels = np.random.default_rng(0).normal(size=(len(labels), 3, 32, 32)).astype(np.float32)
    np.savez(path, pixel_values=pixels, **{names.get("label", "label"): np.array(labels)})
    return path


def test_a_classifier_scores_itself(tmp_path: Path) -> None:
    network = load_network(write_toy(TOYS["vit"], tmp_path / "vit"))
    path = write_images(tmp_path / "x.npz", [0, 1, 2, 3], label="kind")
    scorer = Classification(label="kind").scorer(task_data(tmp_path / "vit", path, batch_size=3), network)
    with torch.no_grad(), np.load(path) as data:
        logits = network(pixel_values=torch.from_numpy(data["pixel_values"])).logits.double()
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4), reduction="none")
    np.testing.assert_allclose(scorer.losses(network), expected.numpy(), rtol=0, atol=1e-4)
    require_parts(scorer, network, tolerance=1e-4)
    np.testing.assert_array_equal(scorer.credits(network), (logits.argmax(-1) == torch.arange(4)).double().numpy())


def test_a_zero_shot_head(tmp_path: Path) -> None:
    """Cosines of projected image and text features over the temperature, as the whole model computes them."""
    folder = write_speaker(tmp_path / "clip", "clip")
    network = load_network(folder)
    head = clip_head(folder, NAMES, TEMPLATES[:1])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        rows = [
            network(pixel_values=pixels, input_ids=torch.tensor([ids_of(f"a photo of a {name}.")])).logits_per_image
            for name in NAMES
        ]
        found = head.predict(network, EncodedBatch({"pixel_values": pixels})).logits
    scale = float(network.logit_scale.detach().exp())
    torch.testing.assert_close(found, torch.cat(rows, dim=1), rtol=0, atol=64 * torch.finfo(torch.float32).eps * scale)


def test_names_of_classes_make_a_head(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "clip", "clip")
    network = load_network(folder)
    kind = configure(Classification, {"classes": list(NAMES), "templates": list(TEMPLATES)})
    losses = []
    for labels in ([2, 0, 1], ["bird", "cat", "dog"]):
        path = write_images(tmp_path / "x.npz", labels)
        losses.append(kind.scorer(task_data(folder, path), network).losses(network))
    np.testing.assert_array_equal(*losses)
    head = tmp_path / "head.safetensors"
    write_head(clip_head(folder, NAMES, TEMPLATES), head)
    data = task_data(folder, write_images(tmp_path / "x.npz", [2, 0, 1]))
    with_head = TaskData(data.name, data.source, data.encoder, data.batch_size, head)
    np.testing.assert_array_equal(Classification().scorer(with_head, network).losses(network), losses[0])
    with pytest.raises(UsageError, match="a head and names of classes are given"):
        kind.scorer(with_head, network)


def test_only_clip_has_a_text_tower(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a CLIP model"):
        clip_head(write_speaker(tmp_path / "bert", "bert"), NAMES, TEMPLATES)
    with pytest.raises(BadInput, match="needs names of classes and at least one template"):
        clip_head(tmp_path, NAMES, ())

    network = load_network(write_toy(TOYS["vit"], tmp_path / "vit"))
    with pytest.raises(BadInput, match="gives no image_embeds"):
        FeatureHead(torch.zeros(2, 48), pooling="projected").predict(
            network, EncodedBatch({"pixel_values": torch.zeros(1, 3, 32, 32)})
        )


def test_a_label_that_is_no_class_is_named(tmp_path: Path) -> None:
    folder = write_speaker(tmp_path / "clip", "clip")
    rows = tmp_path / "x.jsonl"
    rows.write_text(json.dumps({"text": "x", "label": "cow"}) + "\n")
    kind = configure(Classification, {"classes": list(NAMES)})
    with pytest.raises(BadInput, match=r"x.jsonl:1: the label 'cow' is none of"):
        kind.scorer(task_data(folder, rows), load_network(folder))
