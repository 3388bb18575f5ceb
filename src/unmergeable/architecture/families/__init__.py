"""Every supported family, by the ``model_type`` (or diffusers ``_class_name``) of its config."""

from collections.abc import Callable

from unmergeable.architecture.blocks import Architecture
from unmergeable.architecture.declare import Config, Names
from unmergeable.architecture.families import decoders, diffusion, encoder_decoders, encoders, gpt, latent

FAMILIES: dict[str, Callable[[Config, Names], Architecture]] = {
    "llama": decoders.llama,
    "mistral": decoders.llama,
    "qwen2": decoders.llama,
    "gemma": decoders.gemma,
    "gemma2": decoders.gemma,
    "qwen3": decoders.qwen3,
    "qwen3_moe": decoders.qwen3,
    "gemma3_text": decoders.qwen3,
    "stablelm": decoders.stablelm,
    "cohere": decoders.cohere,
    "olmo2": decoders.olmo2,
    "phi3": decoders.phi3,
    "mixtral": decoders.mixtral,
    "deepseek_v2": latent.deepseek,
    "deepseek_v3": latent.deepseek,
    "phi": gpt.phi,
    "gpt2": gpt.gpt2,
    "gptj": gpt.gptj,
    "gpt_neox": gpt.gpt_neox,
    "opt": gpt.opt,
    "bloom": gpt.bloom,
    "falcon": gpt.falcon,
    "bert": encoders.bert,
    "roberta": encoders.bert,
    "xlm-roberta": encoders.bert,
    "vit": encoders.vit,
    "dinov2": encoders.dinov2,
    "clip": encoders.clip,
    "clip_text_model": encoders.clip,
    "clip_vision_model": encoders.clip,
    "siglip": encoders.clip,
    "siglip_text_model": encoders.clip,
    "siglip_vision_model": encoders.clip,
    "t5": encoder_decoders.t5,
    "UNet2DConditionModel": diffusion.unet,
}

_ANY = "any invertible matrix per head"
_GROUPED = "one complex number per rotary pair and key-value head"
_PARTIAL = "one complex number per rotary pair, any invertible matrix on the coordinates without positions"
_HEAD_NORM = "signs per rotary pair, quarter turns and gains per layer (an RMS norm sits on every query and key head)"

QUERY_KEY_GROUPS: dict[str, str] = {
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": _GROUPED,
    "phi3": _GROUPED,
    "mixtral": _GROUPED,
    "qwen3": _HEAD_NORM,
    "qwen3_moe": _HEAD_NORM,
    "gemma3_text": _HEAD_NORM,
    "stablelm": f"{_PARTIAL}; with qk_layernorm one sign per head, and gains per layer",
    "cohere": f"{_GROUPED}; with use_qk_norm one sign per head, and gains per layer",
    "olmo2": "signs and gains per rotary pair and key-value head (an RMS norm spans all queries, another all keys)",
    "deepseek_v2": f"{_ANY} on the part without positions, one complex number per rotary pair and layer on the rest",
    "deepseek_v3": f"{_ANY} on the part without positions, one complex number per rotary pair and layer on the rest",
    "phi": f"{_PARTIAL}; with qk_layernorm gains per layer",
    "gpt2": _ANY,
    "gptj": _PARTIAL,
    "gpt_neox": _PARTIAL,
    "opt": _ANY,
    "bloom": _ANY,
    "falcon": f"{_GROUPED}; {_ANY} in the ALiBi models",
    "bert": _ANY,
    "roberta": _ANY,
    "xlm-roberta": _ANY,
    "vit": _ANY,
    "dinov2": _ANY,
    "clip": _ANY,
    "clip_text_model": _ANY,
    "clip_vision_model": _ANY,
    "siglip": _ANY,
    "siglip_text_model": _ANY,
    "siglip_vision_model": _ANY,
    "t5": _ANY,
    "UNet2DConditionModel": _ANY,
}
"""What each family leaves between queries and keys. Between values and output it is any invertible matrix for all."""

_ROTATIONS = "any rotation, with the gains of norms folded into what reads them and out again"
_TIED = "signed permutations while the output head is the embedding; any rotation once it is stored apart"
_EITHER = f"{_ROTATIONS}; signed permutations while the output head is the embedding"
_SIGNED = "signed permutations (norms behind the blocks keep rotations out)"
_ORDERS = "permutations, and one sign for all coordinates (LayerNorm)"

RESIDUAL_GROUPS: dict[str, str] = {
    "llama": _EITHER,
    "mistral": _EITHER,
    "qwen2": _EITHER,
    "gemma": _TIED,
    "gemma2": _SIGNED,
    "phi3": _EITHER,
    "mixtral": _EITHER,
    "qwen3": _EITHER,
    "qwen3_moe": _EITHER,
    "gemma3_text": _SIGNED,
    "stablelm": _ORDERS,
    "cohere": _ORDERS,
    "olmo2": _SIGNED,
    "deepseek_v2": _EITHER,
    "deepseek_v3": _EITHER,
    "phi": _ORDERS,
    "gpt2": _ORDERS,
    "gptj": _ORDERS,
    "gpt_neox": _ORDERS,
    "opt": _ORDERS,
    "bloom": _ORDERS,
    "falcon": _ORDERS,
    "bert": _ORDERS,
    "roberta": _ORDERS,
    "xlm-roberta": _ORDERS,
    "vit": _ORDERS,
    "dinov2": _ORDERS,
    "clip": f"{_ORDERS}, in each tower",
    "clip_text_model": "none: its layers are what others read",
    "clip_vision_model": "none: its layers are what others read",
    "siglip": "none: the vectors of both towers are the output",
    "siglip_text_model": "none: the vectors are the output",
    "siglip_vision_model": "none: the vectors are the output",
    "t5": "signed permutations, one for both stacks; any rotation in files that store the output head apart",
    "UNet2DConditionModel": f"{_ORDERS}, in each transformer",
}
"""What each family leaves to its residual stream, in models with an output head: without one the stream goes out."""
