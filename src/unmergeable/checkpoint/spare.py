"""Tensors in a file that its network does not need: buffers it computes itself, and second copies of tied weights.

Old releases of transformers wrote rotary frequencies, causal masks, position numbers, indices of relative positions and
T5's bias of positions between encoder and decoder, which nothing reads, into checkpoints, newer ones do not; a tied
head is stored by some tools and left out by others. Neither makes two networks different.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

_BUFFERS = re.compile(
    r"""(.*\.)?( (original_)?inv_freq | (attn|attention|self_attention|crossattention)\.(bias|masked_bias) | masked_bias
    | position_ids | token_type_ids | num_batches_tracked | embed_positions\.weights | rotary_emb\.(cos|sin)_cached
    | relative_position_index | (encoder|decoder)\.version | EncDecAttention\.relative_attention_bias\.weight )""",
    re.VERBOSE,
)
# Heads and embeddings lie outside the layers: no part of their names is a number.
_HEADS = re.compile(
    r"""([A-Za-z_]\w*\.)*( lm_head | embed_out | output | lm_head\.decoder | (cls\.)?predictions\.decoder
    | vocab_projector | generator_lm_head | proj_out | lm_head\.out_proj | output_projection | pred_layer\.proj
    | lm_loss | mlm_score\.decoder | head\.decoder | shared
    | \w*(encoder|decoder)\.(embed_tokens|word_embeddings) )\.weight
    | decoder\.weight""",
    re.VERBOSE,
)
_HEAD_BIASES = {
    "lm_head.decoder.bias": "lm_head.bias",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "predictions.decoder.bias": "predictions.bias",
}
_EMBEDDING = re.compile(
    r"([A-Za-z_]\w*\.)*(shared|embed_tokens|word_embeddings|wte|embed_in|tok_embeddings|token_embedding|word_embedding|tokens_embed)\.weight"
)


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name is computed by the network itself wherever it is missing, or not read at all."""
    return _BUFFERS.fullmatch(name) is not None


def is_output_head(name: str) -> bool:
    """Whether a tensor of this name is an output embedding, which many networks tie to the input embedding."""
    return _HEADS.fullmatch(name) is not None


def is_input_embedding(name: str) -> bool:
    """Whether a tensor of this name is the embedding of tokens, [vocabulary, hidden]."""
    return _EMBEDDING.fullmatch(name) is not None


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration ties the output embedding to the input's; None where it leaves that to its class."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def is_spare(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a network of this configuration does without a tensor of this name in its files."""
    return is_buffer(name) or (is_output_head(name) and is_tied(config) is True)


def tied_to(name: str, names: Collection[str]) -> str | None:
    """The tensor among ``names`` that the output head (or its bias) called ``name`` is a copy of, where it is tied."""
    for copy, original in _HEAD_BIASES.items():
        if name == copy or name.endswith("." + copy):
            found = name.removesuffix(copy) + original
            return found if found in names else None
    if not is_output_head(name):
        return None
    # Of several embeddings one is the original: what encoder and decoder share, or else not the encoder's.
    embeddings = [other for other in names if is_input_embedding(other)]
    nearest = min(embeddings, key=_distance_from_output, default=name)
    return None if nearest == name else nearest


def _distance_from_output(embedding: str) -> int:
    parts = embedding.split(".")
    return 0 if "shared" in parts else 1 + ("encoder" in parts)
