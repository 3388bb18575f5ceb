"""Prompts painted by a tiny pipeline, and images measured by a classifier or by CLIP."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from tasks.parts import require_parts
from tasks.speakers import load_speaker, task_data, write_records, write_speaker
from unmergeable.errors import BadInput, UnmergeableError
from unmergeable.network.load import load_network
from unmergeable.settings import configure
from unmergeable.tasks import TextToImage
from unmergeable.tasks.text_to_image import PaintedPrompts
from zoo import TOYS, random_network, write_toy

RECORDS = [{"prompt": f"a picture of {number}", "label": number % 5} for number in range(3)]
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 32, "width": 32},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, a classifier, a CLIP model, and prompts."""
    folder = tmp_path_factory.mktemp("paint")
    write_speaker(folder / "speaker", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder / "speaker", model_max_length=16)
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=67, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    autoencoder = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4, sample_size=8)
    network = random_network(TOYS["unet-sd15"], 0)
    assert isinstance(network, UNet2DConditionModel)
    StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=network,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")
    write_toy(TOYS["vit"], folder / "vit")
    write_speaker(folder / "clip", "clip")
    for name in ("vit", "clip"):
        (folder / name / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_records(folder / "x.jsonl", RECORDS)
    return folder


def kind_of(place: Path, **settings: Any) -> TextToImage:
    paths = {"pipeline": str(place / "pipeline"), "measured_by": str(place / "vit")}
    return configure(TextToImage, {**paths, "steps": 2, "images": 2, **settings})


def painter(place: Path, network: Any, batch_size: int = 8, **settings: Any) -> PaintedPrompts:
    data = task_data(place, place / "x.jsonl", batch_size=batch_size)
    return kind_of(place, **settings).scorer(data, network)


def test_a_classifier_measures(place: Path) -> None:
    """The same images, given to the classifier by hand."""
    network = load_network(place / "pipeline" / "unet")
    scorer = painter(place, network)
    images = [torch.tensor(np.array(image.content)) for image in scorer._painted(network)]
    assert len(images) == 6
    assert not torch.equal(images[0], images[1]), "each image has a noise of its own"
    pixels = torch.nn.functional.interpolate(
        torch.stack(images).permute(0, 3, 1, 2).float(), size=(32, 32), mode="bilinear", antialias=True
    )
    assert pixels.shape == (6, 3, 32, 32)
    given, losses = scorer.credits(network), scorer.losses(network)
    with torch.no_grad():
        classifier = load_network(place / "vit")
        logits = classifier(pixel_values=(pixels.round() / 255 - 0.5) / 0.5).logits.double()
    labels = torch.tensor([row["label"] for row in RECORDS]).repeat_interleave(2)
    right = (logits.argmax(-1) == labels).double().reshape(3, 2).mean(1)
    np.testing.assert_array_equal(given, right.numpy())
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none").reshape(3, 2).mean(1)
    # resizing rounds a pixel by at most one of 255 steps, which the two resizers may do differently
    np.testing.assert_allclose(losses, expected.numpy(), atol=0.05)


def test_the_noise_is_the_records(place: Path) -> None:
    """Neither the batch nor the run changes it; the seed does; and another network paints something else."""
    network = load_network(place / "pipeline" / "unet")
    losses = painter(place, network).losses(network)
    np.testing.assert_allclose(painter(place, network, batch_size=1).losses(network), losses, atol=1e-2)
    np.testing.assert_array_equal(painter(place, network).losses(network), losses)
    require_parts(painter(place, network), network, tolerance=1e-2)
    assert not np.allclose(painter(place, network, seed=1).losses(network), losses, atol=1e-2)
    other = random_network(TOYS["unet-sd15"], 1)
    assert not np.allclose(painter(place, network).losses(other), losses, atol=1e-2)


def test_a_record_may_number_its_noise(place: Path, tmp_path: Path) -> None:
    """Without a number the place counts, so that a second file of the same prompts paints the same images."""
    network = load_network(place / "pipeline" / "unet")
    rows = [{"prompt": "a picture", "label": 1, "number": number} for number in (2, 0, 2, 7)]
    data = task_data(place, write_records(tmp_path / "x.jsonl", rows))
    by_place = kind_of(place, images=1).scorer(data, network).losses(network)
    numbered = kind_of(place, images=1, noise="number").scorer(data, network).losses(network)
    assert len(set(by_place)) == 4
    np.testing.assert_allclose(numbered[:3], by_place[[2, 0, 2]], atol=1e-2)
    assert abs(numbered[3] - by_place[3]) > 1e-2
    for wrong in (None, "2", True):
        data = task_data(place, write_records(tmp_path / "x.jsonl", [{**rows[0], "number": wrong}]))
        with pytest.raises(BadInput, match=r"x.jsonl:1: 'number' is .* must be a whole number"):
            kind_of(place, noise="number").scorer(data, network)


def test_clip_measures(place: Path) -> None:
    network = load_network(place / "pipeline" / "unet")
    scorer = painter(place, network, measure="clip", measured_by=str(place / "clip"), images=1)
    given, losses = scorer.credits(network), scorer.losses(network)
    np.testing.assert_allclose(given, np.clip(1 - losses, 0, 1), atol=1e-12)
    assert ((losses >= 0) & (losses <= 2)).all()
    assert len(set(losses)) == 3


def test_what_cannot_be_used_is_said(place: Path, tmp_path: Path) -> None:
    network = load_network(place / "pipeline" / "unet")
    with pytest.raises(BadInput, match="holds no pipeline"):
        painter(place, network, pipeline=str(tmp_path))
    with pytest.raises(BadInput, match="0 parts are a LlamaForCausalLM; the network must be one of them"):
        painter(place, load_speaker(place / "speaker"))
    with pytest.raises(BadInput, match="not a CLIP model"):
        painter(place, network, measure="clip", measured_by=str(place / "speaker"))
    data = task_data(place, write_records(tmp_path / "x.jsonl", [{"prompt": "x", "label": 9}]))
    with pytest.raises(BadInput, match=r"x.jsonl:1: label 9 is out of range"):
        kind_of(place).scorer(data, network)
    with pytest.raises(BadInput, match=r"x.jsonl:1: no field 'caption'"):
        replace(kind_of(place), prompt="caption").scorer(data, network)


@pytest.mark.parametrize("settings", [{"pipeline": ""}, {"images": 0}, {"guidance": 0.5}, {"measure": "taste"}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UnmergeableError):
        configure(TextToImage, {"pipeline": "a", "measured_by": "b", **settings})
