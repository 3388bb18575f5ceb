"""The owner's job, every exact protection on every family, through files: protect, load, compare, merge, restore."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmergeable
from unmergeable.errors import NotEquivalent
from unmergeable.protections import PROTECTIONS
from zoo import TOYS, Toy, load_toy, outputs, write_toy

CONDITION = 4.0
EXACT = [name for name, method in PROTECTIONS.items() if method().requirements().has_key]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def write_sibling(base: Path, folder: Path, seed: int, size: float = 0.02) -> Path:
    """A stand-in for a fine-tune: every tensor of the base moved by ``size`` relative, nothing else changed."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in tensors_in(base).items():
        noise = torch.randn(tensor.shape, generator=generator)
        spread = tensor.float().std() if tensor.numel() > 1 else tensor.float().abs()
        tensors[name] = (tensor.float() + size * spread * noise).to(tensor.dtype)
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (file,) = base.glob("*.safetensors")
    save_file(tensors, folder / file.name, metadata={"format": "pt"})
    return folder


def gap(folder: Path, expected: torch.Tensor, toy: Toy, dtype: torch.dtype = torch.float32) -> float:
    found = outputs(load_toy(folder, toy, dtype), toy)
    return float((found - expected).norm() / expected.norm())


# Every family's map is exercised by the gauge, whose spaces hold those of mergelock; params orders units by itself.
SOME = ("llama", "gpt2", "mixtral", "t5", "vit", "unet-sd15")
OWNERS_JOBS = [("gauge", name) for name in TOYS] + [
    (method, name) for method in ("mergelock", "params") for name in SOME
]
PRODUCT = [(method, name) for method in EXACT for name in TOYS]


@pytest.mark.parametrize(
    ("method", "name"),
    [*OWNERS_JOBS, *(pytest.param(*job, marks=pytest.mark.slow) for job in PRODUCT if job not in OWNERS_JOBS)],
)
def test_protects_loads_collapses_and_restores(method: str, name: str, tmp_path: Path) -> None:
    toy = TOYS[name]
    base = write_toy(toy, tmp_path / "base")
    expert = write_sibling(base, tmp_path / "expert", seed=1)
    sibling = write_sibling(base, tmp_path / "sibling", seed=2)
    expected = outputs(load_toy(expert, toy), toy)
    result = unmergeable.protect(expert, base=base, method=method, out=tmp_path / "out", key=tmp_path / "key", seed=7)

    # The function: float32 within 2e-5, loaded by plain from_pretrained.
    assert gap(tmp_path / "out", expected, toy) <= 2e-5
    assert result.measured_error is not None
    assert result.measured_error <= result.predicted_error
    assert result.exact is not None
    assert result.exact.changed_tensors > 0.15 * result.exact.tensors
    original, protected = tensors_in(expert), tensors_in(tmp_path / "out")
    assert sum(not torch.equal(protected[key], original[key]) for key in original) > 0.15 * len(original)

    # The merge: harmless with the expert, a collapse with what was released. Harmless is the control.
    for folder, out in ((expert, "merged"), (tmp_path / "out", "merged-protected")):
        unmergeable.merge(
            base=base, experts=[(folder, 0.5), (sibling, 0.5)], method="task_arithmetic", out=tmp_path / out
        )
    plain, collapsed = (gap(tmp_path / out, expected, toy) for out in ("merged", "merged-protected"))
    # A toy's feed-forwards have few units, and params keeps groups of them together.
    assert collapsed > (1.5 if method == "params" else 4) * plain, (collapsed, plain)

    # The way back.
    unmergeable.restore(tmp_path / "out", key=tmp_path / "key", out=tmp_path / "restored")
    restored = tensors_in(tmp_path / "restored")
    for key, tensor in original.items():
        assert (restored[key] - tensor).norm() <= 1e-5 * tensor.norm()


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", ["params,gauge", "gauge,params", "mergelock,params,gauge"])
def test_exact_protections_compose_and_are_rounded_once(method: str, name: str, tmp_path: Path) -> None:
    toy = TOYS[name]
    expert = write_toy(toy, tmp_path / "expert", dtype=torch.float32)
    unmergeable.protect(expert, base=expert, method=method, out=tmp_path / "out", key=tmp_path / "key", seed=7)
    assert gap(tmp_path / "out", outputs(load_toy(expert, toy), toy), toy) <= 2e-5
    unmergeable.restore(tmp_path / "out", key=tmp_path / "key", out=tmp_path / "restored")
    original, restored = tensors_in(expert), tensors_in(tmp_path / "restored")
    for key, tensor in original.items():
        assert (restored[key] - tensor).norm() <= 1e-5 * tensor.norm()


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("name", ["llama-bias-tied-mqa", "gemma"])
def test_tied_embeddings_stay_tied_or_are_stored_apart_and_come_back(name: str, untie: bool, tmp_path: Path) -> None:
    toy = TOYS[name]
    expert = write_toy(toy, tmp_path / "expert")
    settings = {"untie": untie}
    out, restored = tmp_path / "out", tmp_path / "restored"
    result = unmergeable.protect(
        expert, base=expert, method="gauge", settings=settings, out=out, key=tmp_path / "key", seed=7
    )
    assert gap(out, outputs(load_toy(expert, toy), toy), toy) <= 2e-5
    assert result.exact is not None
    assert ("any rotation" in result.exact.groups["residual"]) == (not untie)  # what it says it could do, or does
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is not untie
    assert ("lm_head.weight" in tensors_in(out)) == untie
    assert unmergeable.verify(expert, out).is_equal
    unmergeable.restore(out, key=tmp_path / "key", out=restored)
    assert json.loads((restored / "config.json").read_text())["tie_word_embeddings"] is True
    original = tensors_in(expert)
    assert tensors_in(restored).keys() == original.keys()
    for key, tensor in tensors_in(restored).items():
        assert (original[key] - tensor).norm() <= 1e-5 * tensor.norm()


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3", "gpt2", "clip", "bert", "t5"])
def test_verify_sees_through_streams_and_experts_without_the_key(name: str, tmp_path: Path) -> None:
    toy = TOYS[name]
    expert = write_toy(toy, tmp_path / "expert")
    unmergeable.protect(expert, base=expert, method="gauge", out=tmp_path / "out", key=tmp_path / "key", seed=7)
    assert unmergeable.verify(expert, tmp_path / "out").is_equal
    # The control: one small change, in an embedding, a norm or an expert, and the two are not equal.
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    for part in ("embed", "norm", "expert"):
        changed = next((key for key in tensors if part in key.lower() and key.endswith("weight")), None)
        if changed is not None:
            save_file({**tensors, changed: tensors[changed] * 1.001}, file, metadata={"format": "pt"})
            assert not unmergeable.verify(expert, tmp_path / "out").equivalence.is_equal, changed


HALVES = [
    (method, name, dtype)
    for method in EXACT
    for name in ("llama", "qwen3", "gemma3", "gpt2", "deepseek_v3", "vit", "t5", "unet-sd15")
    for dtype in (torch.bfloat16, torch.float16)
]


# Rounding is the network's and the gauge's: one method in one dtype each, and every pair of them on a Llama.
@pytest.mark.parametrize(
    ("method", "name", "dtype"),
    [
        half
        if half[1] == "llama" or half[::2] == ("gauge", torch.bfloat16)
        else pytest.param(*half, marks=pytest.mark.slow)
        for half in HALVES
    ],
)
def test_half_precision_stays_within_its_bound(method: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    toy = TOYS[name]
    expert = write_toy(toy, tmp_path / "expert", dtype=dtype)
    expected = outputs(load_toy(expert, toy), toy)
    unmergeable.protect(expert, base=expert, method=method, out=tmp_path / "out", key=tmp_path / "key", seed=7)
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "out").values()} >= {dtype}
    unit = torch.finfo(dtype).eps / 2
    assert gap(tmp_path / "out", expected, toy) <= 64 * unit * CONDITION
    # The bound is generous in bfloat16; rounding once keeps the gap at that of rounding the weights once more.
    # Errors of a few hundred independent roundings of size u, each carried by a factor of at most the condition number.
    assert gap(tmp_path / "out", expected, toy) <= 8 * unit * CONDITION


def test_verification_catches_a_gauge_the_network_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protect must refuse to publish when the map is wrong: give Llama the rotary pairs of GPT-J."""
    from unmergeable.architecture.families import decoders

    toy = TOYS["llama"]
    expert = write_toy(toy, tmp_path / "expert")
    right = decoders.score_parts
    monkeypatch.setattr(decoders, "separate_attention", _with_interleaved_pairs(decoders.separate_attention))
    assert right is decoders.score_parts
    with pytest.raises(NotEquivalent, match="outputs move by"):
        unmergeable.protect(expert, base=expert, method="mergelock", out=tmp_path / "out", key=tmp_path / "key", seed=7)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "key").exists()


def _with_interleaved_pairs(original):  # type: ignore[no-untyped-def]
    def build(*arguments, **settings):  # type: ignore[no-untyped-def]
        return original(*arguments, **{**settings, "pairing": "interleaved"})

    return build
