"""The mask of MergeGuard against a dense computation, and what counts as a layer."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toy_checkpoints import toy_checkpoint
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.errors import UsageError
from unmergeable.protections import PROTECTIONS
from unmergeable.protections.mergeguard.method import MergeGuard
from unmergeable.protections.trained import block_of
from unmergeable.settings import configure


def pair(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> tuple[MemorySource, MemorySource]:
    """A base and an expert of three tensors, some weights of which did not change."""
    generator = torch.Generator().manual_seed(seed)
    base, expert = {}, {}
    for name, shape in (("layers.0.a.weight", (40, 30)), ("layers.0.a.bias", (40,)), ("layers.1.b.weight", (30, 20))):
        base[name] = torch.randn(shape, generator=generator).to(dtype)
        vector = 0.01 * torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.3)
        expert[name] = (base[name] + vector).to(dtype)
    return MemorySource(base), MemorySource(expert)


def dense_mask(base: Mapping[str, Tensor], expert: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Which weights are the most significant, by sorting all of them at once."""
    vectors = {name: (expert[name].float() - base[name].float()).abs() for name in base}
    everything = torch.cat([vector.reshape(-1) for vector in vectors.values()])
    kept = math.ceil(share * len(everything))
    threshold = everything.sort(descending=True).values[kept - 1]
    return {name: vector >= threshold for name, vector in vectors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 1.0])
def test_the_mask_is_that_of_a_dense_computation(dtype: torch.dtype, share: float) -> None:
    base, expert = pair(dtype)
    method = MergeGuard(significant_share=share)
    threshold = method.threshold(expert, base, base.names)
    expected = dense_mask(base.tensors, expert.tensors, share)
    masked = 0
    for name in base.names:
        protected = method.mask(expert.tensors[name], base.tensors[name], threshold)
        assert protected.dtype == dtype
        # With beta = 1 a masked weight is that of the base, bit for bit.
        assert torch.equal(protected, torch.where(expected[name], base.tensors[name], expert.tensors[name]))
        masked += int(expected[name].sum())
    if dtype != torch.bfloat16 and share < 0.5:  # no equal magnitudes: neither rounding to 8 bits nor zeros
        assert masked == method.rank(sum(tensor.numel() for tensor in base.tensors.values()))


def test_the_threshold_is_a_magnitude_of_the_whole_model() -> None:
    base, expert = pair()
    method = MergeGuard(significant_share=0.1)
    threshold = method.threshold(expert, base, base.names)
    vectors = torch.cat([(expert.tensors[n] - base.tensors[n]).abs().reshape(-1) for n in base.names])
    assert int((vectors >= threshold).sum()) == method.rank(len(vectors)) == 184
    with ThreadPoolExecutor(2) as pool:
        assert method.threshold(expert, base, base.names[::-1], each=pool.map) == threshold
    # Control: of one tensor alone it is another one.
    assert method.threshold(expert, base, base.names[:1]) != threshold


def test_beta_says_how_far() -> None:
    base, expert = pair(torch.float64)
    name = base.names[0]
    half = MergeGuard(beta=0.5).mask(expert.tensors[name], base.tensors[name], 0.0)
    # Two roundings of a sum of numbers below 10.
    middle = (expert.tensors[name] + base.tensors[name]) / 2
    assert torch.allclose(half, middle, rtol=0, atol=20 * torch.finfo(torch.float64).eps)
    beyond = MergeGuard(beta=2.0).mask(expert.tensors[name], base.tensors[name], 0.0)
    assert torch.allclose(beyond, 2 * base.tensors[name] - expert.tensors[name], rtol=0, atol=1e-14)


EMBEDDINGS_NORMS_HEADS = {
    "llama": ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"),
    "bert": ("bert.embeddings.word_embeddings.weight",),
    "vit": ("vit.embeddings.patch_embeddings.projection.weight", "vit.layernorm.weight", "classifier.weight"),
    "t5": ("shared.weight", "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"),
}


@pytest.mark.parametrize("name", EMBEDDINGS_NORMS_HEADS)
def test_what_lies_outside_the_blocks_is_never_touched(name: str) -> None:
    toy = toy_checkpoint(name)
    layers = MergeGuard().layers(toy.architecture, toy.tensors)
    inside = {tensor for tensors in layers.values() for tensor in tensors}
    assert not inside & set(EMBEDDINGS_NORMS_HEADS[name])
    # Control: the rest of such a model is not empty, and every attention and feed-forward is in it.
    body = toy.architecture.symmetry.select("query_key", "value_output", "feed_forward")
    assert set(toy.architecture.symmetry.tensors_of(body)) <= inside


def test_layers_are_modules_or_blocks() -> None:
    toy = toy_checkpoint("llama")
    modules = MergeGuard().layers(toy.architecture, toy.tensors)
    blocks = MergeGuard(granularity="block").layers(toy.architecture, toy.tensors)
    assert set(blocks) == {"model.layers.0", "model.layers.1"}
    assert "model.layers.1.mlp.up_proj" in modules
    assert sorted(sum(modules.values(), ())) == sorted(sum(blocks.values(), ()))
    assert MergeGuard(excluded_layers=0.1).excluded_count(modules) == math.ceil(0.1 * len(modules))
    with pytest.raises(UsageError, match=r"excluded_layers=0\.9 leaves none of 2 layers"):
        MergeGuard(excluded_layers=0.9).excluded_count(blocks)


def test_buffers_are_no_layers() -> None:
    toy = toy_checkpoint("gpt2")
    buffers = ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]
    layers = MergeGuard().layers(toy.architecture, [*toy.tensors, *buffers])
    assert layers == MergeGuard().layers(toy.architecture, toy.tensors)
    # Control: a tensor of that module by another name is one.
    assert "transformer.h.0.attn" in MergeGuard().layers(toy.architecture, ["transformer.h.0.attn.gain"])


def test_blocks_by_name() -> None:
    assert block_of("model.layers.3.mlp.experts.7.w1.weight") == "model.layers.3"
    assert block_of("h.0.attn.c_attn.weight") == "h.0"
    assert block_of("encoder.block.2.layer.0.SelfAttention.q.weight") == "encoder.block.2"
    assert block_of("lm_head.weight") is None
    assert block_of("conv1.weight") is None
    assert block_of("layers.12") is None  # a tensor called by a number is no block


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("significant_share", "0"),
        ("significant_share", "1.5"),
        ("excluded_layers", "1"),
        ("excluded_layers", "-0.1"),
        ("beta", "0"),
        ("alpha", "nan"),
        ("steps", "0"),
        ("stages", "third"),
        ("penalty", "max"),
        ("low_rank", "-1"),
        ("confidence", "0"),
    ],
)
def test_refuses_settings_out_of_range(setting: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"mergeguard: {setting} must"):
        configure(MergeGuard, {setting: value})


def test_published_settings_are_the_defaults() -> None:
    method = configure(PROTECTIONS["mergeguard"], {})
    assert isinstance(method, MergeGuard)
    published = (method.stages, method.alpha, method.excluded_layers, method.significant_share, method.beta)
    assert published == ("both", 0.01, 0.1, 0.1, 1.0)


def test_every_setting_is_on_its_page() -> None:
    page = (Path(__file__).parents[3] / "docs" / "mergeguard.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE))
    shown = {
        field.name: f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        for field in dataclasses.fields(MergeGuard)
    }
    assert rows == shown
