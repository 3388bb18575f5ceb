"""What a network does without in its files, by the names that tools gave it."""

from __future__ import annotations

import pytest

from unmergeable.checkpoint.spare import is_buffer, is_input_embedding, is_output_head, is_spare, is_tied, tied_to

BUFFERS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "h.0.attn.bias",
    "transformer.h.11.attn.masked_bias",
    "gpt_neox.layers.0.attention.bias",
    "bert.embeddings.position_ids",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index",
    "transformer.h.0.crossattention.masked_bias",
    "model.encoder.version",
]
PARAMETERS = [
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",
    "decoder.block.0.layer.1.EncDecAttention.q.weight",
    "h.0.attn.c_attn.bias",
    "encoder.layer.0.attention.self.query.bias",
    "layers.0.self_attn.o_proj.bias",
]


def test_buffers() -> None:
    assert all(map(is_buffer, BUFFERS))
    assert not any(map(is_buffer, PARAMETERS))


HEADS = [
    "proj_out.weight",
    "decoder.weight",
    "lm_head.out_proj.weight",
    "text_decoder.embed_tokens.weight",
    "lm_head.weight",
    "embed_out.weight",
    "language_model.lm_head.weight",
    "cls.predictions.decoder.weight",
]
EMBEDDINGS = [
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "shared.weight",
    "bert.embeddings.word_embeddings.weight",
]
NEITHER = [
    "transformer_blocks.0.proj_out.weight",
    "vae.decoder.weight",
    "model.layers.0.mlp.output.weight",
    "layers.0.shared.weight",
    "embeddings.position_embeddings.weight",
]


def test_heads_and_embeddings_lie_outside_the_layers() -> None:
    assert all(map(is_output_head, HEADS))
    assert all(map(is_input_embedding, EMBEDDINGS))
    assert not any(is_output_head(name) or is_input_embedding(name) for name in NEITHER)


TIED: list[tuple[dict[str, object], bool | None]] = [
    ({"tie_word_embeddings": True}, True),
    ({"text_config": {"tie_word_embeddings": False}}, False),
    ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
    ({}, None),
]


@pytest.mark.parametrize(("config", "tied"), TIED, ids=str)
def test_whether_a_configuration_ties(config: dict[str, object], tied: bool | None) -> None:
    assert is_tied(config) is tied
    assert is_spare("lm_head.weight", config) is (tied is True)
    assert is_spare("h.0.attn.bias", config)
    assert not is_spare("model.norm.weight", config)


def test_what_a_head_is_tied_to() -> None:
    names = ["roberta.embeddings.word_embeddings.weight", "lm_head.bias", "lm_head.dense.weight"]
    assert tied_to("lm_head.decoder.weight", names) == names[0]
    assert tied_to("lm_head.decoder.bias", names) == "lm_head.bias"
    assert tied_to("lm_head.dense.weight", names) is None
    assert tied_to("encoder.embed_tokens.weight", ["shared.weight"]) == "shared.weight"
    assert tied_to("lm_head.weight", ["model.norm.weight"]) is None


def test_copies_of_one_embedding_have_one_original() -> None:
    """T5 and BART store the same table up to four times. None may be the copy of another copy."""
    names = ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight", "shared.weight"]
    assert [tied_to(name, names) for name in names] == [names[3]] * 3 + [None]
    assert [tied_to(name, names[:3]) for name in names[:3]] == [None, names[0], names[0]]
    prefixed = [f"model.{name}" for name in names]
    assert [tied_to(name, prefixed) for name in prefixed] == [prefixed[3]] * 3 + [None]
