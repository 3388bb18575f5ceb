"""The owner's job on types that no family declares, through files: protect, load, compare, restore, take back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmergeable
from unmergeable.architecture import FAMILIES
from unmergeable.architecture.derived import known_map
from unmergeable.derivation.build import Specimen, class_named, is_diffusion
from unmergeable.derivation.model_types import built, usual_config
from unmergeable.derivation.shrink import Sizes

SIZES = Sizes(heads=6, groups=2, head_size=12, intermediate=44, experts=4)
"""Other numbers than the maps were derived with."""

KINDS = ["qwen3_5_text", "esm", "m2m_100", "whisper", "deit", "llava", "PixArtTransformer2DModel"]
"""One of every kind: text with linear attention, masked, from text and sound to text, images, both, diffusion."""

QUICK = ["granite", "glm4", "distilbert", "whisper", "llava", "SD3Transformer2DModel"]
MORE = [
    "olmo3", "exaone4", "qwen2_moe", "gemma4_text", "apertus", "glm4_moe", "bart", "deit", "qwen3_5_text", "esm",
    "m2m_100", "PixArtTransformer2DModel", "FluxTransformer2DModel", "persimmon", "esmc",
]  # fmt: skip


def specimen(kind: str) -> Specimen:
    derived = known_map(kind)
    assert derived is not None
    network_class = class_named(derived.network_class)
    return built(usual_config(kind, network_class), network_class, SIZES)


def write(network: Any, folder: Path, seed: int | None = None) -> Path:
    """Save in float32; with a seed, every tensor moved a little, as by a fine-tune."""
    network.float().save_pretrained(folder)
    if seed is not None:
        (file,) = folder.glob("*.safetensors")
        generator = torch.Generator().manual_seed(seed)
        moved = {
            name: tensor + 0.02 * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)
            for name, tensor in load_file(file).items()
        }
        save_file(moved, file, metadata={"format": "pt"})
    return folder


def outputs(folder: Path, like: Specimen) -> torch.Tensor:
    options = {} if is_diffusion(type(like.network)) else {"attn_implementation": "eager"}
    network = type(like.network).from_pretrained(folder, **options).eval()
    inputs = {
        k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in like.inputs.items()
    }
    with torch.no_grad():
        found = network(**inputs)
    return next(found[name] for name in ("logits", "last_hidden_state", "sample") if name in found)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return 0.0 if torch.equal(found, expected) else float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mergelock_keeps_a_derived_type_too(kind: str, tmp_path: Path) -> None:
    like = specimen(kind)
    base = write(like.network, tmp_path / "base")
    expert = write(like.network, tmp_path / "expert", seed=1)
    expected = outputs(expert, like)
    unmergeable.protect(expert, base=base, method="mergelock", out=tmp_path / "out", key=tmp_path / "key", seed=3)
    (before,), (after,) = (list((tmp_path / name).glob("*.safetensors")) for name in ("expert", "out"))
    ours, theirs = load_file(before), load_file(after)
    assert relative(outputs(tmp_path / "out", like), expected) <= 2e-5
    halves = {name: (tensor + theirs[name]) / 2 for name, tensor in ours.items()}
    save_file(halves, before, metadata={"format": "pt"})
    assert relative(outputs(expert, like), expected) > 0.1, "control: the mean with the unprotected expert is broken"
    unmergeable.restore(tmp_path / "out", key=tmp_path / "key", out=tmp_path / "restored")
    (file,) = (tmp_path / "restored").glob("*.safetensors")
    assert max(relative(tensor, ours[name]) for name, tensor in load_file(file).items()) <= 1e-5


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)])
def test_a_derived_type_is_protected_from_files(kind: str, tmp_path: Path) -> None:
    assert kind not in FAMILIES
    like = specimen(kind)
    base = write(like.network, tmp_path / "base")
    expert = write(like.network, tmp_path / "expert", seed=1)
    expected = outputs(expert, like)

    unmergeable.protect(expert, base=base, method="gauge", out=tmp_path / "out", key=tmp_path / "key", seed=3)
    (before,), (after,) = (list((tmp_path / name).glob("*.safetensors")) for name in ("expert", "out"))
    ours, theirs = load_file(before), load_file(after)
    assert relative(outputs(tmp_path / "out", like), expected) <= 2e-5
    moved = [name for name in ours if relative(theirs[name], ours[name]) > 0.1]
    assert len(moved) > 0.15 * len(ours)

    halves = {name: (tensor + theirs[name]) / 2 for name, tensor in ours.items()}
    save_file(halves, before, metadata={"format": "pt"})
    assert relative(outputs(expert, like), expected) > 0.1, "control: the mean with the unprotected expert is broken"
    save_file(ours, before, metadata={"format": "pt"})

    unmergeable.restore(tmp_path / "out", key=tmp_path / "key", out=tmp_path / "restored")
    (file,) = (tmp_path / "restored").glob("*.safetensors")
    assert max(relative(tensor, ours[name]) for name, tensor in load_file(file).items()) <= 1e-5

    unmergeable.recover(tmp_path / "out", base=base, method="nearest_orbit", out=tmp_path / "recovered")
    (file,) = (tmp_path / "recovered").glob("*.safetensors")
    recovered, start = load_file(file), load_file(next(base.glob("*.safetensors")))

    def distance(tensors: dict[str, torch.Tensor]) -> float:
        return sum(float((tensors[name] - start[name]).square().sum()) for name in start) ** 0.5

    assert distance(recovered) <= 1.02 * distance(ours)
    assert distance(theirs) > 5 * distance(ours), "control: the protected expert is far from the base"
