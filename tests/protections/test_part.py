"""One part of a network of several is protected and the others stay as they are, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import unmergeable
from toy_checkpoints import toy_checkpoint
from unmergeable.architecture.derived import known_map
from unmergeable.architecture.detect import detect
from unmergeable.architecture.parts import part_of, parts_of, restricted
from unmergeable.derivation.build import Specimen, class_named
from unmergeable.derivation.model_types import built, usual_config
from unmergeable.derivation.shrink import SMALL, UNSEEN
from unmergeable.errors import UsageError
from unmergeable.protections.mergelock import MergeLock

PARTS = ("language", "vision", "projector")


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "language"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "language"),
        ("model.layers.0.self_attn.q_proj.weight", "language"),
        ("lm_head.weight", "language"),
        ("multi_modal_projector.linear_1.weight", "projector"),
        ("qformer.encoder.layer.0.attention.output.dense.weight", "projector"),
        ("model.audio_tower.layers.0.fc1.weight", "audio"),
        ("model.encoder.layers.0.fc1.weight", "encoder"),
        ("model.decoder.layers.0.encoder_attn.q_proj.weight", "decoder"),
        ("context_embedder.weight", "language"),
    ],
)
def test_a_part_is_told_by_names(tensor: str, part: str) -> None:
    assert part_of(tensor) == part


@pytest.mark.parametrize("part", ["vision", "language"])
def test_every_basis_of_a_part_lies_inside_it(part: str) -> None:
    whole = toy_checkpoint("clip").architecture
    assert set(parts_of(whole)) == {"vision", "language"}
    own = restricted(whole, part).symmetry
    assert {part_of(name) for name in own.tensors_of(own.spaces)} == {part}
    assert set(own.spaces) < set(whole.symmetry.spaces)
    assert {space.role for space in own.spaces.values()} >= {"query_key", "value_output", "feed_forward", "norm"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Specimen]:
    """A small BLIP-2: base, expert, and inputs for it."""
    kind = transformers.Blip2ForConditionalGeneration
    small = built(usual_config("blip-2", kind), kind, SMALL)
    base, expert = (tmp_path_factory.mktemp("part") / name for name in ("base", "expert"))
    for folder in (base, expert):
        small.network.float().save_pretrained(folder)
    (file,) = expert.glob("*.safetensors")
    generator = torch.Generator().manual_seed(1)
    moved = {
        name: tensor + 0.02 * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(file).items()
    }
    save_file(moved, file, metadata={"format": "pt"})
    return base, expert, small


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def logits(folder: Path, small: Specimen) -> torch.Tensor:
    network = type(small.network).from_pretrained(folder, attn_implementation="eager").eval()
    inputs = {
        name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in small.inputs.items()
    }
    with torch.no_grad():
        return network(**inputs).logits


def specimen(kind: str) -> Specimen:
    derived = known_map(kind)
    assert derived is not None
    network_class = class_named(derived.network_class)
    return built(usual_config(kind, network_class), network_class, UNSEEN)


def written(small: Specimen, folder: Path, *, seed: int | None = None) -> Path:
    """Saved in float32; with a seed, every tensor moved a little, as by a fine-tune."""
    small.network.float().save_pretrained(folder)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        moved = {
            name: tensor + 0.02 * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)
            for name, tensor in weights(folder).items()
        }
        save_file(moved, next(folder.glob("*.safetensors")), metadata={"format": "pt"})
    return folder


TOWERS = {
    "llava": {"vision", "projector", "language"},
    "gemma3": {"vision", "language"},
    "qwen2_5_vl": {"vision", "language"},
    "qwen3_vl": {"vision", "language"},
    "qwen2_vl": {"vision", "language"},
    "llava_next": {"vision", "projector", "language"},
    "mistral3": {"vision", "projector", "language"},
    "paligemma": {"vision", "language"},
    "idefics3": {"vision", "language"},
    "smolvlm": {"vision", "language"},
    "internvl": {"vision", "projector", "language"},
    "mllama": {"vision", "language"},
}
"""Types that read images, and the parts that their maps have blocks in; a projector of one matrix has none."""

QUICK = ["llava", "qwen2_5_vl"]


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in TOWERS]
)
def test_each_part_of_a_network_that_reads_images(kind: str, tmp_path: Path) -> None:
    small = specimen(kind)
    assert "pixel_values" in small.inputs
    base, expert = written(small, tmp_path / "base"), written(small, tmp_path / "expert", seed=1)
    config = json.loads((expert / "config.json").read_text("utf-8"))
    before, expected = weights(expert), logits(expert, small)
    assert set(parts_of(detect(config, {name: tuple(one.shape) for name, one in before.items()}))) == TOWERS[kind]
    for part in sorted(TOWERS[kind]):
        out, key = tmp_path / part, tmp_path / f"{part}.key"
        unmergeable.protect(expert, base=base, method="gauge", part=part, out=out, key=key, seed=3)
        after = weights(out)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {part_of(name) for name in changed} == {part}
        assert float((logits(out, small) - expected).norm() / expected.norm()) <= 2e-5
        halves = {name: (tensor + after[name]) / 2 for name, tensor in before.items()}
        save_file(halves, next(out.glob("*.safetensors")), metadata={"format": "pt"})
        change = float((logits(out, small) - expected).norm() / expected.norm())
        assert change > 1e-3, "control: the outputs depend on the part, and its mean with the expert's is another"


@pytest.mark.parametrize("method", ["gauge", "mergelock"])
@pytest.mark.parametrize("part", ["language", "vision"])
def test_what_is_not_of_the_part_is_the_same_byte_for_byte(
    method: str, part: str, model: tuple[Path, Path, Specimen], tmp_path: Path
) -> None:
    base, expert, small = model
    out, key = tmp_path / "out", tmp_path / "key"
    unmergeable.protect(expert, base=base, method=method, part=part, out=out, key=key, seed=3)
    before, after = weights(expert), weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {part_of(name) for name in changed} == {part}
    assert len(changed) > 5
    expected = logits(expert, small)
    assert float((logits(out, small) - expected).norm() / expected.norm()) <= 2e-5
    unmergeable.restore(out, key=key, out=tmp_path / "restored")
    restored = weights(tmp_path / "restored")
    assert all(float((restored[name] - before[name]).norm()) <= 1e-5 * float(before[name].norm()) for name in before)


def test_without_a_part_all_of_them_change(model: tuple[Path, Path, Specimen], tmp_path: Path) -> None:
    """The control."""
    base, expert, _ = model
    unmergeable.protect(expert, base=base, method="gauge", out=tmp_path / "out", key=tmp_path / "key", seed=3)
    before, after = weights(expert), weights(tmp_path / "out")
    assert {part_of(name) for name in before if not torch.equal(before[name], after[name])} == set(PARTS)


def test_several_methods_take_the_same_part(model: tuple[Path, Path, Specimen], tmp_path: Path) -> None:
    base, expert, _ = model
    found = unmergeable.protect(
        expert, base=base, method="mergelock,params", part="vision", out=tmp_path / "out", key=tmp_path / "key", seed=3
    )
    assert found.fingerprint
    before, after = weights(expert), weights(tmp_path / "out")
    assert {part_of(name) for name in before if not torch.equal(before[name], after[name])} == {"vision"}


def test_a_wrong_name_gives_those_there_are(model: tuple[Path, Path, Specimen], tmp_path: Path) -> None:
    base, expert, _ = model
    message = r"^part: this blip-2 model has no 'audio' that is known; it has vision, projector, language\.$"
    with pytest.raises(UsageError, match=message):
        unmergeable.protect(expert, base=base, part="audio", out=tmp_path / "out", key=tmp_path / "key")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "key").exists()


def test_a_method_that_trains_takes_no_part(model: tuple[Path, Path, Specimen], tmp_path: Path) -> None:
    base, expert, _ = model
    with pytest.raises(UsageError, match=r"^part: trap2 changes the whole network"):
        unmergeable.protect(expert, base=base, method="trap2", part="vision", out=tmp_path / "out")


def test_the_part_is_on_the_record_and_older_keys_stay_as_they_were() -> None:
    assert "part" not in MergeLock().recipe()["settings"]
    assert MergeLock(part="vision").recipe()["settings"]["part"] == "vision"
