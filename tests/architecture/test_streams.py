"""Residual streams: what is declared, when it is left out, and that no stored tensor is forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from toy_checkpoints import ToyCheckpoint, toy_checkpoint
from unmergeable.architecture import Architecture, detect
from unmergeable.architecture.streams import EXPOSED
from zoo import TOYS

HIDDEN = 48


def redetected(name: str, *, drop: tuple[str, ...] = (), add: Any = None, **config: Any) -> Architecture:
    toy = toy_checkpoint(name)
    shapes = {key: shape for key, shape in toy.shapes.items() if key not in drop}
    return detect({**toy.config, **config}, {**shapes, **(add or {})})


def of(toy: ToyCheckpoint, role: str) -> set[str]:
    return set(toy.architecture.symmetry.tensors_of(toy.architecture.symmetry.select(role, folding=True)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TOYS)
def test_every_tensor_as_wide_as_the_stream_lies_along_it(name: str) -> None:
    """Read off the shapes, independently of the declarations: a width of 48 that is neither heads nor hidden units."""
    toy = toy_checkpoint(name)
    if len(toy.architecture.residuals) != 1 or name == "clip-text":
        return
    inside = {"_norm.", "attn.q_norm", "attn.k_norm", "q_layernorm", "k_layernorm", "a_layernorm"}
    for tensor, shape in toy.shapes.items():
        if HIDDEN in shape and tensor not in of(toy, "residual"):
            biases = {".q_proj.bias", ".v_proj.bias", ".query.bias", ".value.bias", ".key.bias", ".k_proj.bias"}
            of_heads = any(tensor.endswith(bias) for bias in biases) or any(part in tensor for part in inside)
            assert of_heads or tensor in {"bert.pooler.dense.bias", "classifier.weight"}, tensor


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"drop": ("lm_head.weight",)}),  # an embedding model: the hidden states are what it gives
        ("llama-bias-tied-mqa", {"architectures": ["LlamaModel"]}),
        ("bert-classification", {"drop": ("classifier.weight", "classifier.bias")}),
        ("vit", {"drop": ("classifier.weight", "classifier.bias")}),
        ("t5", {"drop": ("decoder.final_layer_norm.weight",)}),
    ],
)
def test_a_network_without_a_head_gives_the_stream_out(name: str, changes: Any) -> None:
    assert toy_checkpoint(name).architecture.residuals  # the control
    architecture = redetected(name, **changes)
    assert architecture.residuals == ()
    assert architecture.symmetry.missing == {"residual": EXPOSED}
    assert not architecture.symmetry.select("residual", "norm", folding=True)


@pytest.mark.parametrize(
    ("name", "extra"),
    [("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("gpt2", "transformer.h.0.attn.bias")],
)
def test_buffers_are_no_obstacle(name: str, extra: str) -> None:
    assert redetected(name, add={extra: (8,)}).residuals


@pytest.mark.parametrize("extra", ["score.dense.weight", "classifier.out_proj.weight", "lm_head.extra"])
def test_a_head_of_an_unknown_kind_is(extra: str) -> None:
    architecture = redetected("llama", add={extra: (HIDDEN, HIDDEN)})
    assert architecture.residuals == ()
    assert extra in architecture.symmetry.missing["residual"]
    assert architecture.symmetry.select("query_key")  # attention does not care


def test_tied_embeddings_keep_the_last_gain_and_rotations_out() -> None:
    (apart,) = redetected("llama").residuals
    (tied,) = redetected("llama", drop=("lm_head.weight",), tie_word_embeddings=True).residuals
    assert apart.norms[-1].readers
    assert not tied.norms[-1].readers
    assert (apart.tied, tied.tied) == (None, "model.embed_tokens.weight")
    assert apart.rotation_limit == ""
    assert "untied" in tied.rotation_limit
    # A classifier does not read through the embedding, whatever the config says of ties.
    (classifier,) = redetected("llama-classification", tie_word_embeddings=True).residuals
    assert classifier.tied is None
    assert classifier.norms[-1].readers


def test_a_copy_of_the_tied_head_moves_with_the_embedding() -> None:
    """Some checkpoints store both although the config ties them; transformers reads the embedding."""
    (stream,) = redetected("llama", tie_word_embeddings=True).residuals
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {axis.tensor for axis in stream.axes}
    assert stream.rotation_limit


def test_a_classifier_on_class_token_and_patches_reads_the_stream_twice() -> None:
    symmetry = toy_checkpoint("dinov2").architecture.symmetry
    (leg,) = (leg for leg in symmetry.legs["classifier.weight"] if leg.space == "residual")
    assert leg.spectators == ((2, HIDDEN),)


def test_a_norm_in_front_of_two_blocks_is_read_by_both() -> None:
    for name, expected in (("gptj", 4), ("falcon-7b-like", 2), ("llama", 3), ("deepseek_v3", 2)):
        norm = toy_checkpoint(name).architecture.residuals[0].norms[0]
        assert len(norm.readers) == expected, name


def test_experts_and_their_router_read_one_norm() -> None:
    toy = toy_checkpoint("mixtral")
    norm = next(item for item in toy.architecture.residuals[0].norms if "0.post_attention" in item.gain)
    readers = {axis.tensor for axis in norm.readers}
    assert "model.layers.0.block_sparse_moe.gate.weight" in readers
    assert len(readers) == 1 + 2 * 4


def test_groups_of_experts() -> None:
    groups = {"deepseek_v2": 1, "deepseek_v3": 2}  # V2's greedy router does not look at groups
    for name, count in groups.items():
        (mixture,) = toy_checkpoint(name).architecture.mixtures
        assert mixture.groups == count
    (limited,) = redetected("deepseek_v2", topk_method="group_limited_greedy").mixtures
    assert limited.groups == 2


def test_old_names_of_norms_are_names_of_norms() -> None:
    """BERT on the hub: gamma and beta, and a pretraining head beside the one for masked words."""
    toy = toy_checkpoint("bert")

    def renamed(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    shapes = {renamed(name): shape for name, shape in toy.shapes.items()}
    shapes |= {"bert.pooler.dense.weight": (HIDDEN, HIDDEN), "bert.pooler.dense.bias": (HIDDEN,)}
    shapes |= {"cls.seq_relationship.weight": (2, HIDDEN), "cls.seq_relationship.bias": (2,)}
    symmetry = detect(toy.config, shapes).symmetry
    along = set(symmetry.tensors_of(symmetry.select("residual")))
    assert {renamed(name) for name in of(toy, "residual")} | {"bert.pooler.dense.weight"} == along


def test_a_norm_without_a_gain_keeps_the_stream_as_it_is() -> None:
    architecture = redetected("opt", drop=("model.decoder.layers.1.final_layer_norm.weight",))
    assert architecture.residuals == ()
    assert "final_layer_norm.weight is missing" in architecture.symmetry.missing["residual"]
