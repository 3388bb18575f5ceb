"""Tiny networks of every supported family, from the real transformers and diffusers classes.

Weights are random, norm gains and biases included: with gains at one and biases at zero, half of the mistakes
a symmetry map can contain would not show. Small odd head counts keep axes from having the same length by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Toy:
    """``build`` returns the network; ``inputs`` makes its arguments from a generator; ``output`` picks the tensor."""

    name: str
    build: Callable[[], Any]
    inputs: Callable[[torch.Generator], dict[str, Any]]
    output: str = "logits"


MIXTURES = {"mixtral": "experts", "qwen3_moe": "experts", "deepseek_v2": "experts", "deepseek_v3": "experts"}
VOCABULARY = 67
LENGTH = 11


def _ids(generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)}


def _pixels(size: int) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda generator: {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}


def _encoder_decoder(generator: torch.Generator) -> dict[str, Any]:
    return {**_ids(generator), "decoder_input_ids": _ids(generator)["input_ids"][:, :7]}


def _clip_inputs(generator: torch.Generator) -> dict[str, Any]:
    return {**_pixels(32)(generator), **_ids(generator)}


def _unet_inputs(generator: torch.Generator) -> dict[str, Any]:
    return {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(1, 5, 24, generator=generator),
    }


def _make(config_name: str, model_name: str, **settings: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        config = getattr(transformers, config_name)(**settings)
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"  # the grouped kernels do not take float64
        return getattr(transformers, model_name)(config)

    return build


def _unet(**settings: Any) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(**settings)

    return build


_LM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MHA = {key: value for key, value in _LM.items() if key != "num_key_value_heads"}
_ENCODER = {key: value for key, value in _MHA.items() if key not in {"bos_token_id", "eos_token_id"}}
_VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "image_size": 32,
    "patch_size": 8,
}
_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
_MLA = {
    **_LM,
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 28,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

TOYS: dict[str, Toy] = {
    toy.name: toy
    for toy in (
        Toy("llama", _make("LlamaConfig", "LlamaForCausalLM", **_LM), _ids),
        Toy(
            "llama-bias-tied-mqa",
            _make(
                "LlamaConfig",
                "LlamaForCausalLM",
                **{**_LM, "num_key_value_heads": 1, "head_dim": 16},
                attention_bias=True,
                mlp_bias=True,
                tie_word_embeddings=True,
            ),
            _ids,
        ),
        Toy(
            "llama-classification",
            _make("LlamaConfig", "LlamaForSequenceClassification", **_LM, num_labels=3),
            _ids,
        ),
        Toy("mistral", _make("MistralConfig", "MistralForCausalLM", **_LM, sliding_window=4), _ids),
        Toy("qwen2", _make("Qwen2Config", "Qwen2ForCausalLM", **_LM), _ids),
        Toy("smollm3", _make("SmolLM3Config", "SmolLM3ForCausalLM", **_LM, no_rope_layer_interval=2), _ids),
        Toy("qwen3", _make("Qwen3Config", "Qwen3ForCausalLM", **_LM, head_dim=12), _ids),
        Toy("gemma", _make("GemmaConfig", "GemmaForCausalLM", **_LM, head_dim=12), _ids),
        Toy("gemma2", _make("Gemma2Config", "Gemma2ForCausalLM", **_LM, head_dim=12, sliding_window=4), _ids),
        Toy("gemma3", _make("Gemma3TextConfig", "Gemma3ForCausalLM", **_LM, head_dim=12, sliding_window=4), _ids),
        Toy("phi", _make("PhiConfig", "PhiForCausalLM", **_MHA, partial_rotary_factor=0.5), _ids),
        Toy(
            "phi-qk-norm",
            _make("PhiConfig", "PhiForCausalLM", **_MHA, partial_rotary_factor=0.5, qk_layernorm=True),
            _ids,
        ),
        Toy("phi3", _make("Phi3Config", "Phi3ForCausalLM", **_LM), _ids),
        Toy(
            "gpt2",
            _make(
                "GPT2Config", "GPT2LMHeadModel", vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=6,
                n_inner=80, n_positions=64, bos_token_id=1, eos_token_id=2,
            ),
            _ids,
        ),
        Toy(
            "gptj",
            _make(
                "GPTJConfig", "GPTJForCausalLM", vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4,
                n_inner=80, n_positions=64, rotary_dim=8, bos_token_id=1, eos_token_id=2,
            ),
            _ids,
        ),
        Toy("gpt_neox", _make("GPTNeoXConfig", "GPTNeoXForCausalLM", **_MHA, rotary_pct=0.5), _ids),
        Toy(
            "opt",
            _make(
                "OPTConfig", "OPTForCausalLM", vocab_size=VOCABULARY, hidden_size=48, ffn_dim=80, num_hidden_layers=2,
                num_attention_heads=6, max_position_embeddings=64, word_embed_proj_dim=48,
            ),
            _ids,
        ),
        Toy(
            "opt-350m-like",
            _make(
                "OPTConfig", "OPTForCausalLM", vocab_size=VOCABULARY, hidden_size=48, ffn_dim=80, num_hidden_layers=2,
                num_attention_heads=6, max_position_embeddings=64, word_embed_proj_dim=24, do_layer_norm_before=False,
            ),
            _ids,
        ),
        Toy(
            "bloom",
            _make("BloomConfig", "BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6),
            _ids,
        ),
        Toy(
            "falcon-7b-like",
            _make(
                "FalconConfig", "FalconForCausalLM", vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2,
                num_attention_heads=6, multi_query=True, new_decoder_architecture=False, parallel_attn=True,
                bias=False, alibi=False,
            ),
            _ids,
        ),
        Toy(
            "falcon-40b-like",
            _make(
                "FalconConfig", "FalconForCausalLM", vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2,
                num_attention_heads=6, num_kv_heads=3, new_decoder_architecture=True, bias=True, alibi=False,
            ),
            _ids,
        ),
        Toy(
            "falcon-rw-like",
            _make(
                "FalconConfig", "FalconForCausalLM", vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2,
                num_attention_heads=6, multi_query=False, new_decoder_architecture=False, parallel_attn=False,
                bias=True, alibi=True,
            ),
            _ids,
        ),
        Toy(
            "stablelm",
            _make("StableLmConfig", "StableLmForCausalLM", **_LM, partial_rotary_factor=0.5, use_qkv_bias=True),
            _ids,
        ),
        Toy(
            "stablelm-qk-norm",
            _make("StableLmConfig", "StableLmForCausalLM", **_LM, partial_rotary_factor=0.5, qk_layernorm=True),
            _ids,
        ),
        Toy("cohere", _make("CohereConfig", "CohereForCausalLM", **_LM), _ids),
        Toy("cohere-qk-norm", _make("CohereConfig", "CohereForCausalLM", **_LM, use_qk_norm=True), _ids),
        Toy("olmo2", _make("Olmo2Config", "Olmo2ForCausalLM", **_LM), _ids),
        Toy(
            "mixtral",
            _make("MixtralConfig", "MixtralForCausalLM", **_LM, num_local_experts=4, num_experts_per_tok=2),
            _ids,
        ),
        Toy(
            "qwen3_moe",
            _make(
                "Qwen3MoeConfig", "Qwen3MoeForCausalLM", **_LM, head_dim=12, num_experts=4, num_experts_per_tok=2,
                moe_intermediate_size=28, decoder_sparse_step=1, mlp_only_layers=[0],
            ),
            _ids,
        ),
        Toy("deepseek_v2", _make("DeepseekV2Config", "DeepseekV2ForCausalLM", **_MLA, q_lora_rank=None), _ids),
        Toy("deepseek_v3", _make("DeepseekV3Config", "DeepseekV3ForCausalLM", **_MLA, q_lora_rank=16), _ids),
        Toy("bert", _make("BertConfig", "BertForMaskedLM", **_ENCODER), _ids),
        Toy(
            "bert-classification",
            _make("BertConfig", "BertForSequenceClassification", **_ENCODER, num_labels=3),
            _ids,
        ),
        Toy("bert-embedding", _make("BertConfig", "BertModel", **_ENCODER), _ids, "last_hidden_state"),
        Toy("roberta", _make("RobertaConfig", "RobertaForMaskedLM", **_ENCODER), _ids),
        Toy(
            "modernbert",
            _make("ModernBertConfig", "ModernBertForMaskedLM", **_ENCODER, cls_token_id=1, sep_token_id=2),
            _ids,
        ),
        Toy("vit", _make("ViTConfig", "ViTForImageClassification", **_VISION, num_labels=5), _pixels(32)),
        Toy(
            "dinov2",
            _make(
                "Dinov2Config", "Dinov2ForImageClassification", hidden_size=48, num_hidden_layers=2,
                num_attention_heads=6, mlp_ratio=2, image_size=32, patch_size=8, num_labels=5,
            ),
            _pixels(32),
        ),
        Toy(
            "dinov2-swiglu",
            _make(
                "Dinov2Config", "Dinov2Model", hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
                mlp_ratio=2, image_size=32, patch_size=8, use_swiglu_ffn=True,
            ),
            _pixels(32),
            "last_hidden_state",
        ),
        Toy(
            "clip",
            _make(
                "CLIPConfig", "CLIPModel", vision_config=_VISION,
                text_config={**_ENCODER, "eos_token_id": 2, "hidden_size": 36}, projection_dim=20,
            ),
            _clip_inputs,
            "logits_per_image",
        ),
        Toy(
            "clip-vision",
            _make("CLIPVisionConfig", "CLIPVisionModelWithProjection", **_VISION, projection_dim=20),
            _pixels(32),
            "image_embeds",
        ),
        Toy(
            "clip-text",
            _make("CLIPTextConfig", "CLIPTextModel", **_ENCODER, eos_token_id=2),
            _ids,
            "last_hidden_state",
        ),
        Toy(
            "siglip",
            _make(
                "SiglipConfig", "SiglipModel", vision_config=_VISION,
                text_config={**_ENCODER, "projection_size": 48},
            ),
            _clip_inputs,
            "logits_per_image",
        ),
        Toy(
            "t5",
            _make(
                "T5Config", "T5ForConditionalGeneration", vocab_size=VOCABULARY, d_model=48, d_kv=10, d_ff=80,
                num_layers=2, num_heads=5, decoder_start_token_id=0,
            ),
            _encoder_decoder,
        ),
        Toy(
            "flan-t5",
            _make(
                "T5Config", "T5ForConditionalGeneration", vocab_size=VOCABULARY, d_model=48, d_kv=10, d_ff=80,
                num_layers=2, num_heads=5, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            ),
            _encoder_decoder,
        ),
        Toy("unet-sd15", _unet(**_UNET), _unet_inputs, "sample"),
    )
}  # fmt: skip


def random_network(toy: Toy, seed: int = 0, scale: float = 1.0) -> Any:
    """The toy with every parameter random: matrices at 1/sqrt(fan-in), gains around one, biases of 0.2."""
    torch.manual_seed(seed)  # the classes initialise themselves from the global generator
    network = toy.build().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                fan_in = parameter.numel() // parameter.shape[0]
                parameter.copy_(noise * scale / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(parameter.mean() + 0.2 * noise)
        for name, buffer in network.named_buffers():
            if buffer.is_floating_point() and "e_score_correction_bias" in name:
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return network


def write_toy(toy: Toy, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random network of this family as its own library would, and return the folder."""
    random_network(toy, seed).to(dtype).save_pretrained(folder)
    return folder


def load_toy(folder: Path, toy: Toy, dtype: torch.dtype = torch.float32) -> Any:
    """Load a checkpoint with plain ``from_pretrained`` of the toy's class, without remote code."""
    kind = type(toy.build())
    if toy.name.startswith("unet"):
        return kind.from_pretrained(folder, torch_dtype=dtype).eval()
    options = {"experts_implementation": "eager"} if "experts" in MIXTURES.get(toy.name, "") else {}
    return kind.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, attn_implementation="eager", **options
    ).eval()


@torch.no_grad()
def outputs(network: Any, toy: Toy, seed: int = 1) -> torch.Tensor:
    """The toy's output on random inputs, in float64."""
    inputs = toy.inputs(torch.Generator().manual_seed(seed))
    dtype = next(network.parameters()).dtype
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    result: torch.Tensor = getattr(network(**cast), toy.output)
    return result.double()
