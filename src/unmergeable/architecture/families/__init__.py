"""Every supported family, by the ``model_type`` (or diffusers ``_class_name``) of its config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.declare import Config, Names
from unmergeable.architecture.families import decoders, diffusion, encoder_decoders, encoders, gpt, latent
from unmergeable.architecture.symmetry import GroupKind

Kinds = tuple[GroupKind, ...]
"""Groups that a model has side by side, on different coordinates, tensors or layers."""

ROTARY: Kinds = ("rotary",)
FREE: Kinds = ("general_linear",)
PARTLY_ROTARY: Kinds = ("rotary", "general_linear")
RMS_PER_HEAD: Kinds = ("pair_sign", "quarter_turn", "pair_scale")
RMS_FULL_WIDTH: Kinds = ("pair_sign", "pair_scale")
LAYER_NORM_PER_HEAD: Kinds = ("block_sign", "pair_scale")
LAYER_NORM_PARTLY_ROTARY: Kinds = ("block_sign", "pair_scale", "diagonal")
BIASED_LAYER_NORM_PARTLY_ROTARY: Kinds = ("pair_scale", "diagonal")

ROTATIONS: Kinds = ("signed_permutation", "orthogonal")
SIGNED: Kinds = ("signed_permutation",)
ORDERS: Kinds = ("common_sign_permutation",)
CENTRED: Kinds = ("common_sign_permutation", "centred_orthogonal")
NOTHING: Kinds = ()


@dataclass(frozen=True)
class Family:
    """A family's declaration, and the groups that its models leave.

    ``query_key`` and ``residual`` list one entry for each variant that the family's settings choose among.
    """

    declare: Callable[[Config, Names], Architecture]
    query_key: tuple[Kinds, ...]
    residual: tuple[Kinds, ...]


@dataclass(frozen=True)
class Description:
    """What a family leaves between queries and keys, and to its residual stream, in words.

    Between values and output it is any invertible matrix per head for all.
    """

    query_key: str
    residual: str


_LLAMA = Family(decoders.llama, (ROTARY,), (ROTATIONS, SIGNED))
_DEEPSEEK = Family(latent.deepseek, (PARTLY_ROTARY,), (ROTATIONS, SIGNED))
_BERT = Family(encoders.bert, (FREE,), (ORDERS, NOTHING))
_CLIP_TOWER = Family(encoders.clip, (FREE,), (NOTHING,))

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "smollm3": Family(decoders.llama, (PARTLY_ROTARY,), (ROTATIONS, SIGNED)),
    "gemma": Family(decoders.gemma, (ROTARY,), (ROTATIONS, SIGNED)),
    "gemma2": Family(decoders.gemma, (ROTARY,), (SIGNED,)),
    "qwen3": Family(decoders.qwen3, (RMS_PER_HEAD,), (ROTATIONS, SIGNED)),
    "qwen3_moe": Family(decoders.qwen3, (RMS_PER_HEAD,), (ROTATIONS, SIGNED)),
    "gemma3_text": Family(decoders.qwen3, (RMS_PER_HEAD,), (SIGNED,)),
    "stablelm": Family(decoders.stablelm, (PARTLY_ROTARY, LAYER_NORM_PARTLY_ROTARY), (CENTRED, ORDERS)),
    "cohere": Family(decoders.cohere, (ROTARY, LAYER_NORM_PER_HEAD), (CENTRED, ORDERS)),
    "olmo2": Family(decoders.olmo2, (RMS_FULL_WIDTH,), (SIGNED,)),
    "phi3": Family(decoders.phi3, (ROTARY,), (ROTATIONS, SIGNED)),
    "mixtral": Family(decoders.mixtral, (ROTARY,), (ROTATIONS, SIGNED)),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "phi": Family(gpt.phi, (PARTLY_ROTARY, BIASED_LAYER_NORM_PARTLY_ROTARY), (CENTRED, ORDERS)),
    "gpt2": Family(gpt.gpt2, (FREE,), (CENTRED, ORDERS)),
    "gptj": Family(gpt.gptj, (PARTLY_ROTARY,), (CENTRED, ORDERS)),
    "gpt_neox": Family(gpt.gpt_neox, (PARTLY_ROTARY,), (CENTRED, ORDERS)),
    "opt": Family(gpt.opt, (FREE,), (CENTRED, ORDERS)),
    "bloom": Family(gpt.bloom, (FREE,), (CENTRED, ORDERS)),
    "falcon": Family(gpt.falcon, (ROTARY, FREE), (CENTRED, ORDERS)),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "modernbert": Family(encoders.modernbert, (ROTARY,), (ORDERS, NOTHING)),
    "vit": Family(encoders.vit, (FREE,), (CENTRED, NOTHING)),
    "dinov2": Family(encoders.dinov2, (FREE,), (ORDERS, NOTHING)),
    "clip": Family(encoders.clip, (FREE,), (CENTRED, ORDERS)),
    "clip_text_model": _CLIP_TOWER,
    "clip_vision_model": _CLIP_TOWER,
    "siglip": _CLIP_TOWER,
    "siglip_text_model": _CLIP_TOWER,
    "siglip_vision_model": _CLIP_TOWER,
    "t5": Family(encoder_decoders.t5, (FREE,), (ROTATIONS, SIGNED)),
    "UNet2DConditionModel": Family(diffusion.unet, (FREE,), (CENTRED,)),
}

_QUERY_KEY: dict[GroupKind, str] = {
    "general_linear": "any invertible matrix per head",
    "rotary": "one complex number per rotary pair and key-value head",
    "pair_sign": "one sign per rotary pair and key-value head",
    "block_sign": "one sign per key-value head",
    "quarter_turn": "quarter turns per rotary pair and layer",
    "pair_scale": "gains of the norm on queries against those on keys, per rotary pair",
    "diagonal": "gains of the norm on queries against those on keys, per coordinate",
}
_RESIDUAL: dict[Kinds, str] = {
    ROTATIONS: "any rotation, with the gains of norms folded into what reads them and out again",
    SIGNED: "signed permutations",
    ORDERS: "permutations, and one sign for all coordinates (LayerNorm)",
    CENTRED: "permutations, and one sign for all coordinates (LayerNorm)",  # no protection draws the rotations
    NOTHING: "none where the stream itself is the output",
}


def described(family: str) -> Description:
    """What the family called ``family`` in :data:`FAMILIES` leaves to a protection; variants are joined by "or"."""
    declared = FAMILIES[family]
    query_key = [" and ".join(_QUERY_KEY[kind] for kind in kinds) for kinds in declared.query_key]
    residual = dict.fromkeys(_RESIDUAL[kinds] for kinds in declared.residual)
    return Description("; or ".join(query_key), "; or ".join(residual))
