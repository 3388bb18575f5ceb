"""The way back: without the record, through several protections, and never with the key of another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unmergeable
from unmergeable.checkpoint.manifest import check_files, read_manifest
from unmergeable.errors import BadInput, KeyFileError, UsageError
from unmergeable.gauge.key import read_key
from zoo import TOYS, write_toy

METHODS: dict[str, dict[str, Any]] = {
    "mergelock": {}, "gauge": {"quantisation_friendly": True}, "params": {}, "gauge-": {"residual": False},
}  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A base and an expert that was fine-tuned from it."""
    write_toy(TOYS["llama"], tmp_path / "base", seed=0)
    write_toy(TOYS["llama"], tmp_path / "expert", seed=0)
    tensors = weights(tmp_path / "expert")
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors.values():
        tensor += 0.05 * torch.randn(tensor.shape, generator=generator) * tensor.abs().mean()
    save_file(tensors, tmp_path / "expert" / "model.safetensors", {"format": "pt"})
    return tmp_path


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def protect(
    work: Path, name: str, *, of: str = "expert", method: str = "mergelock", seed: int = 1, **options: Any
) -> Any:
    options = {"base": work / "base", "out": work / name, "method": method.rstrip("-"), "seed": seed, **options}
    return unmergeable.protect(work / of, **options)


def saved_again(release: Path, out: Path, dtype: torch.dtype = torch.float32, noise: float = 0.0) -> Path:
    """What is left after somebody loaded and saved it: config and weights."""
    out.mkdir()
    (out / "config.json").write_bytes((release / "config.json").read_bytes())
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: (tensor + noise * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator)).to(dtype)
        for name, tensor in weights(release).items()
    }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def distance(folder: Path, original: Path) -> float:
    """The largest relative distance of a tensor."""
    ours, theirs = weights(folder), weights(original)
    return max(float((ours[name].float() - tensor).norm() / tensor.norm()) for name, tensor in theirs.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "noise", "bound"),
    [(torch.float32, 0.0, 1e-4), (torch.bfloat16, 0.0, 0.1), (torch.float32, 0.05, 0.5)],
    ids=["as it was", "in bfloat16", "trained further"],
)
def test_a_copy_without_a_record(work: Path, method: str, dtype: torch.dtype, noise: float, bound: float) -> None:
    """The key knows the original by a few of its numbers."""
    protect(work, "release", method=method, settings=METHODS[method])
    copy = saved_again(work / "release", work / "copy", dtype, noise)
    unmergeable.restore(copy, key=work / "release.key", out=work / "restored")
    assert distance(work / "restored", work / "expert") < bound
    protect(work, "other", method=method, settings=METHODS[method], seed=2)
    with pytest.raises(KeyFileError, match=r"is not the key of .*; give the one made with it"):
        unmergeable.restore(copy, key=work / "other.key", out=work / "wrong")
    assert not (work / "wrong").exists()


def test_a_key_that_knows_nothing_asks_for_the_record(work: Path) -> None:
    protect(work, "release")
    key = work / "release.key"
    import json

    document = json.loads(key.read_text())
    del document["marks"]
    key.write_text(json.dumps(document))
    copy = saved_again(work / "release", work / "copy")
    with pytest.raises(BadInput, match=r"copy the unmergeable\.json of the release into"):
        unmergeable.restore(copy, key=key, out=work / "restored")
    (copy / "unmergeable.json").write_bytes((work / "release" / "unmergeable.json").read_bytes())
    unmergeable.restore(copy, key=key, out=work / "restored")
    assert distance(work / "restored", work / "expert") < 1e-4


def test_a_protected_release_that_is_protected_again_keeps_its_way_back(work: Path) -> None:
    protect(work, "first")
    result = protect(work, "second", of="first", method="gauge", seed=2)
    assert "is a protected release itself" in result.notes[0]
    unmergeable.restore(work / "second", key=work / "second.key", out=work / "back")
    assert distance(work / "back", work / "first") < 1e-4
    assert distance(work / "back", work / "expert") > 0.1, "the control: it is not the original yet"
    assert check_files(work / "back") == ()
    restored = unmergeable.restore(work / "back", key=work / "first.key", out=work / "original")
    assert restored.note is None
    assert distance(work / "original", work / "expert") < 1e-4
    with pytest.raises(KeyFileError, match="is not the key"):
        unmergeable.restore(work / "second", key=work / "first.key", out=work / "wrong")


def test_three_protections_are_undone_one_by_one(work: Path) -> None:
    for number, (name, of) in enumerate((("a", "expert"), ("b", "a"), ("c", "b"))):
        protect(work, name, of=of, seed=number)
    manifest = read_manifest(work / "c")
    assert manifest is not None
    assert len(manifest.details["earlier_steps"]) == 2
    for name, key in (("b2", "c"), ("a2", "b"), ("expert2", "a")):
        release = {"b2": "c", "a2": "b2", "expert2": "a2"}[name]
        unmergeable.restore(work / release, key=work / f"{key}.key", out=work / name)
    assert distance(work / "expert2", work / "expert") < 1e-4


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_key_without_a_folder_is_refused_with_the_command_that_makes_one(work: Path, dry_run: bool) -> None:
    key = work / "a folder" / "k"
    with pytest.raises(KeyFileError, match=r"its folder does not exist; create it first: mkdir -p '.*/a folder'$"):
        protect(work, "release", key=key, dry_run=dry_run)
    key.parent.mkdir()
    protect(work, "release", key=key, dry_run=dry_run)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("out", "message"),
    [("n" * 250, "too long"), ("expert/inside", "lie inside each other"), ("nowhere/out", "parent folder")],
)
def test_a_dry_run_refuses_the_places_that_the_run_refuses(work: Path, out: str, message: str, dry_run: bool) -> None:
    with pytest.raises(BadInput, match=message):
        protect(work, out, key=work / "k", dry_run=dry_run)
    assert not (work / "k").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_dry_run_looks_at_the_gains(work: Path, dry_run: bool) -> None:
    tensors = weights(work / "expert")
    tensors["model.layers.0.input_layernorm.weight"][0] = 0
    save_file(tensors, work / "expert" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="holds a gain of zero"):
        protect(work, "release", method="gauge", settings={"quantisation": "free"}, dry_run=dry_run)


def test_untying_what_gains_nothing_by_it_is_refused(tmp_path: Path) -> None:
    """Gemma's norms behind each block keep rotations out, whether or not the head is apart."""
    for seed, name in enumerate(("base", "expert")):
        write_toy(TOYS["gemma2"], tmp_path / name, seed=seed)
    with pytest.raises(UsageError, match="gains nothing by it"):
        protect(tmp_path, "release", method="gauge", settings={"untie": True})


@pytest.mark.parametrize("method", ["gauge", "mergelock", "params"])
def test_keys_that_say_nothing_of_quantisation_draw_what_they_drew(work: Path, method: str) -> None:
    """A key made before there was that setting has a recipe without it, and opens its release all the same."""
    result = unmergeable.protect(
        work / "expert", base=work / "base", out=work / "out", method=method, settings={"quantisation": "free"}, seed=1
    )
    key = read_key(result.key)  # type: ignore[arg-type]
    (step,) = key.recipe["steps"]
    assert "quantisation" not in step["settings"], "a recipe as it was before"
    unmergeable.restore(work / "out", key=result.key, out=work / "restored")
    for name, tensor in weights(work / "expert").items():
        assert torch.allclose(weights(work / "restored")[name], tensor, atol=1e-4)
    # Control: the same secret, read as what is drawn by default now, does not give the weights back.
    steps = [{**step, "settings": {**step["settings"], "quantisation": "kept"}}]
    today = replace(key, recipe={**key.recipe, "steps": steps})
    state, config = weights(work / "out"), json.loads((work / "out" / "config.json").read_text())
    wrong = unmergeable.restore_state_dict(state, config, today)
    assert not all(torch.allclose(wrong[name], tensor, atol=1e-2) for name, tensor in weights(work / "expert").items())
