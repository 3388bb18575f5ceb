"""The shield over files: what is written, whatever the threads and shards; what is secret; what is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unmergeable
from low_rank_folder import write_adapter
from unmergeable.checkpoint.manifest import read_manifest
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.ops.protection import protect
from unmergeable.ops.recovery import recover
from unmergeable.protections.sensitivity_shield.method import ShieldFacts
from zoo import TOYS, load_toy, write_toy

SETTINGS = {"unit": 0.1, "perturbation": 0.5}


def write(folder: Path, toy: str) -> None:
    """A base, and fine-tunes with task vectors of their own."""
    write_toy(TOYS[toy], folder / "base", seed=0)
    base = load_file(folder / "base" / "model.safetensors")
    for seed, name in enumerate(("expert", "sibling", "other")):
        shutil.copytree(folder / "base", folder / name)
        generator = torch.Generator().manual_seed(seed)
        tuned = {key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in base.items()}
        save_file(tuned, folder / name / "model.safetensors", {"format": "pt"})
    np.savez(folder / "data.npz", input_ids=np.random.default_rng(0).integers(3, 67, size=(6, 11)))


@pytest.fixture(params=["llama", "gpt2"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write(tmp_path, request.param)
    return tmp_path


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    write(tmp_path, "gpt2")
    return tmp_path


def shield(work: Path, **options: Any) -> ShieldFacts:
    options = {
        "base": work / "base",
        "out": work / "out",
        "siblings": [work / "sibling", work / "other"],
        "data": work / "data.npz",
        "settings": SETTINGS,
        **options,
    }
    (step,) = protect(options.pop("expert", work / "expert"), method="sensitivity_shield", **options).steps
    assert isinstance(step.facts, ShieldFacts)
    return step.facts


def tensors(folder: Path) -> dict[str, Tensor]:
    source = Checkpoint.open(folder)
    return {name: source.tensor(name) for name in source.names}


def dense(work: Path, model: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What everything in memory gives: the release, what is sensitive, and theta_G, for SETTINGS."""
    names = ("base", "expert", "sibling", "other")
    base, expert, sibling, other = ({n: t.double() for n, t in tensors(work / name).items()} for name in names)
    mixture = {n: t + 0.3 * (sibling[n] - t) + 0.05 * (other[n] - t) for n, t in expert.items()}
    perturbed = {n: t + 0.5 * (sibling[n] - base[n]) for n, t in mixture.items()}
    sensitive = None
    for weights in (mixture, perturbed):
        chosen = wanda(work, model, {n: t.float() for n, t in weights.items()}, weights)
        sensitive = chosen if sensitive is None else {n: sensitive[n] & chosen[n] for n in chosen}
    assert sensitive is not None
    magnitudes = {n: (mixture[n] - base[n]).abs().float() for n in sensitive}
    in_order = torch.cat([magnitudes[n][~sensitive[n]] for n in sensitive]).sort(descending=True).values
    last = [in_order[len(in_order) * unit // 10 - 1] for unit in range(1, 10)]
    release = {}
    for name, mixed in mixture.items():
        release[name] = mixed.float()
        if name in sensitive:
            unit = sum((magnitudes[name] < boundary).int() for boundary in last)
            moved = torch.where(unit % 2 == 0, base[name], 2 * mixed - base[name])
            release[name] = torch.where(sensitive[name], mixed, moved).float()
    return release, sensitive, mixture


def wanda(work: Path, model: str, loaded: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Wanda's choice, from hooks of its own."""
    network = load_toy(work / "expert", TOYS[model]).float()
    missing = network.load_state_dict(loaded, strict=False)
    assert not missing.unexpected_keys
    squares: dict[str, Tensor] = {}

    def hook(name: str, module: Any, arguments: Any) -> None:
        flat = arguments[0].double().reshape(-1, arguments[0].shape[-1])
        squares[name] = squares.get(name, 0) + (flat**2).sum(0)

    kinds = ("Linear", "Conv1D")
    linear = {name: module for name, module in network.named_modules() if type(module).__name__ in kinds}
    linear.pop("lm_head")  # no matrix of attention or of a feed-forward
    for name, module in linear.items():
        module.register_forward_pre_hook(partial(hook, name))
    ids = torch.from_numpy(np.load(work / "data.npz")["input_ids"])
    for batch in ids.split(4):
        with torch.no_grad():
            network(input_ids=batch)
    chosen = {}
    for name, module in linear.items():
        weight = weights[f"{name}.weight"]
        rows = weight if type(module).__name__ == "Linear" else weight.T
        scores = rows.abs() * squares[name].sqrt()
        last = scores.sort(dim=1, descending=True).values[:, int(0.2 * rows.shape[1]) - 1]
        mask = scores >= last[:, None]
        chosen[f"{name}.weight"] = mask if rows is weight else mask.T
    return chosen


def test_the_release_is_the_dense_computation(work: Path) -> None:
    model = "gpt2" if "transformer.h.0.ln_1.weight" in tensors(work / "base") else "llama"
    result = shield(work)
    released, (expected, sensitive, mixture) = tensors(work / "out"), dense(work, model)

    assert released.keys() == expected.keys()
    for name, tensor in released.items():
        # theta_G - tau_G has two roundings of float64 before the one of float32.
        torch.testing.assert_close(tensor, expected[name], rtol=2.0**-23, atol=1e-12, msg=name)
    total = sum(mask.numel() for mask in sensitive.values())
    assert result.excluded == sum(int(mask.sum()) for mask in sensitive.values())
    assert (result.ranked, result.mixed) == (total - result.excluded, sum(t.numel() for t in released.values()))
    assert len(result.unit_boundaries) == 9
    changed = [name for name in sensitive if not torch.equal(released[name], mixture[name].float())]
    assert len(changed) == len(sensitive), "control: the local part changes every matrix"


def test_threads_and_shards_do_not_matter(gpt2: Path) -> None:
    shield(gpt2, threads=1)
    first = tensors(gpt2 / "out")
    split(gpt2 / "expert")
    shield(gpt2, threads=3, out=gpt2 / "again")
    second = tensors(gpt2 / "again")

    assert len(list((gpt2 / "again").glob("*.safetensors"))) == 2
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def split(folder: Path) -> None:
    """The weights in two files, in another order."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights, reverse=True)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_the_siblings_are_secret_and_can_be_found_out(gpt2: Path) -> None:
    coefficients = {"parts": "global", "coefficients": "0.31,0.07"}
    shield(gpt2, settings=coefficients, data=None)
    manifest = read_manifest(gpt2 / "out")
    assert manifest is not None
    text = (gpt2 / "out" / "unmergeable.json").read_text()
    assert "sibling" not in text.replace("siblings", "")
    assert "0.31" not in text
    assert "0.07" not in text
    assert set(manifest.inputs) == {"source", "base"}

    sources = [gpt2 / "sibling", gpt2 / "other"]
    found = recover(gpt2 / "out", base=gpt2 / "base", method="source_subtraction", sources=sources, out=gpt2 / "plain")
    estimates = [value for name, value in found.findings.items() if name.startswith("coefficient")]
    # Task vectors of independent draws are nearly orthogonal, not quite.
    assert estimates == pytest.approx([0.31, 0.07], abs=0.05)


def test_parts_alone(gpt2: Path) -> None:
    expert, base = tensors(gpt2 / "expert"), tensors(gpt2 / "base")
    shield(gpt2, settings={"parts": "global", "coefficients": "0.25"}, siblings=[gpt2 / "other"], data=None)
    mixed, other = tensors(gpt2 / "out"), tensors(gpt2 / "other")
    for name, tensor in mixed.items():
        assert torch.equal(tensor, (0.75 * expert[name].double() + 0.25 * other[name].double()).float()), name

    local = {"parts": "local", "exclusion": "random", "random_share": 0.5, "unit": 0.5}
    result = shield(gpt2, settings=local, siblings=[], data=None, out=gpt2 / "local", seed=3)
    released = tensors(gpt2 / "local")
    name = "transformer.h.0.mlp.c_fc.weight"
    kept, reset = (float((released[name] == weights[name]).double().mean()) for weights in (expert, base))
    assert 0.4 < kept < 0.6
    assert 0.15 < reset < 0.4
    assert torch.equal(released["transformer.wte.weight"], expert["transformer.wte.weight"])
    assert result.mixed == 0
    shield(gpt2, settings=local, siblings=[], data=None, out=gpt2 / "seeded", seed=4)
    assert not torch.equal(tensors(gpt2 / "seeded")[name], released[name])


def test_a_head_of_another_shape_stays(gpt2: Path) -> None:
    for name, rows in (("sibling", 70), ("other", 67)):
        file = gpt2 / name / "model.safetensors"
        weights = load_file(file)
        key = "transformer.wte.weight"
        weights[key] = torch.cat([weights[key], weights[key]])[:rows].contiguous()
        save_file(weights, file, {"format": "pt"})
    shield(gpt2)
    assert torch.equal(tensors(gpt2 / "out")[key], tensors(gpt2 / "expert")[key])


def test_experts_of_a_mixture_have_no_score(tmp_path: Path) -> None:
    """The live network fuses them: they are mixed, not ranked, and named."""
    write(tmp_path, "mixtral")
    result = shield(tmp_path)
    released, expert, sibling, other = (tensors(tmp_path / name) for name in ("out", "expert", "sibling", "other"))

    assert len(result.unscored) == 26, "three matrices of four experts, and the router, in two layers"
    for name in result.unscored:
        start = expert[name].double()
        mixed = start + 0.3 * (sibling[name].double() - start) + 0.05 * (other[name].double() - start)
        assert torch.equal(released[name], mixed.float())
    ranked = "model.layers.0.self_attn.q_proj.weight"
    start = expert[ranked].double()
    mixed = start + 0.3 * (sibling[ranked].double() - start) + 0.05 * (other[ranked].double() - start)
    assert not torch.equal(released[ranked], mixed.float()), "control"


def test_a_low_rank_expert_is_merged_into_the_base_first(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    adapter = tmp_path / "adapter"
    layer = "model.layers.0.self_attn.q_proj"
    write_adapter(adapter, tmp_path / "base", layer, merged=tmp_path / "expert")

    shield(tmp_path, expert=adapter)
    shield(tmp_path, out=tmp_path / "plain")
    first, second = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    agree = [float((first[name] - second[name]).abs().max()) for name in first]
    # The product of the factors is rounded elsewhere, so that a weight at a boundary may fall into another unit.
    assert sum(gap > 1e-5 for gap in agree) <= 1
    protected = unmergeable.protect(
        adapter,
        base=tmp_path / "base",
        out=tmp_path / "composed",
        method="sensitivity_shield,mergelock",
        siblings=[tmp_path / "sibling", tmp_path / "other"],
        data=tmp_path / "data.npz",
        settings=SETTINGS,
        seed=0,
    )
    assert protected.out == tmp_path / "composed"
    assert unmergeable.verify(tmp_path / "out", tmp_path / "composed").is_equal


def test_what_is_no_sibling_is_refused(gpt2: Path) -> None:
    with pytest.raises(BadInput, match=r"sibling .*nothing does not exist"):
        shield(gpt2, siblings=[gpt2 / "sibling", gpt2 / "nothing"])
    write_toy(TOYS["llama"], gpt2 / "llama", seed=1)
    with pytest.raises(Mismatch, match=r"sibling .*llama has no tensor transformer\.h\.0"):
        shield(gpt2, siblings=[gpt2 / "sibling", gpt2 / "llama"])
    file = gpt2 / "other" / "model.safetensors"
    weights = load_file(file)
    weights["transformer.h.0.mlp.c_fc.weight"] = weights["transformer.h.0.mlp.c_fc.weight"][:, :-1].contiguous()
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(Mismatch, match=r"tensor transformer\.h\.0\.mlp\.c_fc\.weight is .* in sibling"):
        shield(gpt2)
    assert not (gpt2 / "out").exists()
    assert not (gpt2 / "out.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"siblings": []}, "give one for each coefficient"),
        ({"settings": {"coefficients": "0.3"}}, "siblings 2; give one for each"),
        ({"data": None}, "give some with data=FILE"),
        ({"settings": {"parts": "global"}}, "reads no data: leave out data"),
        ({"settings": {"exclusion": "none"}}, "reads no data: leave out data"),
        ({"settings": {"unit": 0}}, "unit must lie between"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(gpt2: Path, options: dict[str, Any], message: str) -> None:
    for dry_run in (False, True):
        with pytest.raises(UsageError, match=message):
            shield(gpt2, dry_run=dry_run, **options)
    assert not (gpt2 / "out").exists()


def test_data_and_out_are_looked_at_first(gpt2: Path) -> None:
    with pytest.raises(BadInput, match="missing"):
        shield(gpt2, data=gpt2 / "missing.npz", dry_run=True)
    assert shield(gpt2, dry_run=True).to_json()["ranked_weights"] is None
    assert not (gpt2 / "out").exists()
    shutil.copytree(gpt2 / "base", gpt2 / "out")
    with pytest.raises(BadInput, match="exists"):
        shield(gpt2)
