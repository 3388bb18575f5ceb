"""Every supported family, by the ``model_type`` (or diffusers ``_class_name``) of its config."""

from collections.abc import Callable

from unmergeable.architecture.blocks import Architecture
from unmergeable.architecture.declare import Config, Names
from unmergeable.architecture.families import decoders, diffusion, encoder_decoders, encoders, gpt, latent

FAMILIES: dict[str, Callable[[Config, Names], Architecture]] = {
    "llama": decoders.llama,
    "mistral": decoders.llama,
    "qwen2": decoders.llama,
    "gemma": decoders.llama,
    "gemma2": decoders.llama,
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
