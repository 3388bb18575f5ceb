"""Decoder-only language models with separate (or Llama-style fused) projections and gated feed-forwards.

Llama, Mistral, Qwen2, Qwen3, Gemma 1-3, StableLM, Cohere, OLMo 2, Phi-3, Mixtral, Qwen3-MoE.
"""

from __future__ import annotations

from unmergeable.architecture.blocks import Architecture, Attention, FeedForward, Heads, QueryKeyNorm
from unmergeable.architecture.declare import (
    HEADS_ON_TOP,
    Config,
    Names,
    columns,
    dense_or_experts,
    gated,
    rope_setting,
    score_parts,
    separate_attention,
    setting,
    unit_columns,
    units,
)
from unmergeable.architecture.symmetry import Pairing

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_UNTOUCHED = (
    HEADS_ON_TOP,
    r"{prefix}embed_tokens\.weight",
    r"{prefix}norm\.(weight|bias)",
    r"{prefix}layers\.\d+\.\w*layernorm\.(weight|bias)",
    r".*rotary_emb\.inv_freq",
)


def _sizes(config: Config) -> tuple[int, int, int]:
    """Key-value heads, query heads per key-value head, head dimension."""
    heads = int(setting(config, "num_attention_heads"))
    groups = int(setting(config, "num_key_value_heads", default=heads))
    size = int(setting(config, "head_dim", default=int(setting(config, "hidden_size")) // heads))
    return groups, heads // groups, size


def _layers(config: Config, names: Names) -> tuple[str, list[str]]:
    prefix = names.prefix("layers.0.input_layernorm.weight", ("model.", "", "language_model.model."))
    return prefix, [f"{prefix}layers.{index}" for index in range(int(setting(config, "num_hidden_layers")))]


def _untouched(prefix: str) -> tuple[str, ...]:
    return tuple(pattern.format(prefix=prefix.replace(".", r"\.")) for pattern in _UNTOUCHED)


def llama(config: Config, names: Names) -> Architecture:
    """Llama, Mistral, Qwen2, Gemma, Gemma 2: rotary positions, grouped keys, gated feed-forward."""
    return _decoder(config, names)


def _decoder(config: Config, names: Names, *, pairing: Pairing = "half") -> Architecture:
    groups, members, size = _sizes(config)
    prefix, layers = _layers(config, names)
    blocks: list[Attention | FeedForward] = []
    for layer in layers:
        blocks.append(
            separate_attention(
                names,
                f"{layer}.self_attn",
                QKVO,
                groups=groups,
                members=members,
                size=size,
                rotary_size=size,
                pairing=pairing,
            )
        )
        blocks.append(gated(names, f"{layer}.mlp", "gate_proj", "up_proj", "down_proj"))
    return Architecture(str(config["model_type"]), tuple(blocks), _untouched(prefix))


def _rms_per_head(config: Config, module: str, offset: float) -> QueryKeyNorm:
    return QueryKeyNorm(
        "rms",
        "head",
        float(setting(config, "rms_norm_eps", default=1e-6)),
        (f"{module}.q_norm.weight",),
        (f"{module}.k_norm.weight",),
        offset=offset,
    )


def qwen3(config: Config, names: Names) -> Architecture:
    """Qwen3 and Gemma 3: an RMS norm on every query and key head. Gemma stores gains as ``gain - 1``."""
    groups, members, size = _sizes(config)
    prefix, layers = _layers(config, names)
    offset = 1.0 if str(config["model_type"]).startswith("gemma") else 0.0
    blocks: list[Attention | FeedForward] = []
    for layer in layers:
        module = f"{layer}.self_attn"
        norm = _rms_per_head(config, module, offset)
        blocks.append(
            separate_attention(
                names, module, QKVO, groups=groups, members=members, size=size, rotary_size=size, norm=norm
            )
        )
        blocks.extend(dense_or_experts(config, names, f"{layer}.mlp", "gate_proj", "up_proj", "down_proj"))
    untouched = (*_untouched(prefix), r".*\.mlp\.gate\.weight")
    return Architecture(str(config["model_type"]), tuple(blocks), untouched)


def mixtral(config: Config, names: Names) -> Architecture:
    """Mixtral: Llama attention, experts stored as ``block_sparse_moe.experts.E.w1/w3/w2``."""
    groups, members, size = _sizes(config)
    prefix, layers = _layers(config, names)
    blocks: list[Attention | FeedForward] = []
    for layer in layers:
        blocks.append(
            separate_attention(
                names, f"{layer}.self_attn", QKVO, groups=groups, members=members, size=size, rotary_size=size
            )
        )
        blocks.extend(dense_or_experts(config, names, f"{layer}.block_sparse_moe", "w1", "w3", "w2"))
    untouched = (*_untouched(prefix), r".*\.block_sparse_moe\.gate\.weight")
    return Architecture("mixtral", tuple(blocks), untouched)


def olmo2(config: Config, names: Names) -> Architecture:
    """OLMo 2: an RMS norm over the full width of queries and of keys, norms after the blocks."""
    groups, members, size = _sizes(config)
    prefix = names.prefix("layers.0.self_attn.q_proj.weight", ("model.", ""))
    blocks: list[Attention | FeedForward] = []
    for index in range(int(setting(config, "num_hidden_layers"))):
        module = f"{prefix}layers.{index}.self_attn"
        norm = QueryKeyNorm(
            "rms",
            "full",
            float(setting(config, "rms_norm_eps", default=1e-5)),
            (f"{module}.q_norm.weight",),
            (f"{module}.k_norm.weight",),
        )
        blocks.append(
            separate_attention(
                names, module, QKVO, groups=groups, members=members, size=size, rotary_size=size, norm=norm
            )
        )
        blocks.append(gated(names, f"{prefix}layers.{index}.mlp", "gate_proj", "up_proj", "down_proj"))
    return Architecture("olmo2", tuple(blocks), _untouched(prefix))


def cohere(config: Config, names: Names) -> Architecture:
    """Command R: interleaved rotary pairs; the larger models put a LayerNorm on every query and key head."""
    if not config.get("use_qk_norm"):
        return _decoder(config, names, pairing="interleaved")
    groups, members, size = _sizes(config)
    prefix, layers = _layers(config, names)
    blocks: list[Attention | FeedForward] = []
    for layer in layers:
        module = f"{layer}.self_attn"
        norm = QueryKeyNorm(
            "layer",
            "head",
            float(setting(config, "layer_norm_eps", default=1e-5)),
            (f"{module}.q_norm.weight",),
            (f"{module}.k_norm.weight",),
            gain_axis=1,
        )
        blocks.append(
            separate_attention(
                names,
                module,
                QKVO,
                groups=groups,
                members=members,
                size=size,
                rotary_size=size,
                pairing="interleaved",
                norm=norm,
                heads_limit="every head has a norm gain of its own",
            )
        )
        blocks.append(gated(names, f"{layer}.mlp", "gate_proj", "up_proj", "down_proj"))
    return Architecture("cohere", tuple(blocks), _untouched(prefix))


def stablelm(config: Config, names: Names) -> Architecture:
    """StableLM: rotary positions on part of each head; the 12B has a LayerNorm on every query and key head."""
    groups, members, size = _sizes(config)
    prefix, layers = _layers(config, names)
    rotary_size = int(size * float(rope_setting(config, "partial_rotary_factor", 0.25)))
    has_norm = bool(config.get("qk_layernorm"))
    blocks: list[Attention | FeedForward] = []
    for layer in layers:
        query_gains, key_gains = (
            tuple(f"{layer}.self_attn.{side}_layernorm.norms.{head}.weight" for head in range(count))
            for side, count in (("q", groups * members), ("k", groups))
        )
        epsilon = float(setting(config, "layer_norm_eps", default=1e-5))
        norm = QueryKeyNorm("layer", "head", epsilon, query_gains, key_gains)
        blocks.append(
            separate_attention(
                names,
                f"{layer}.self_attn",
                QKVO,
                groups=groups,
                members=members,
                size=size,
                rotary_size=rotary_size,
                norm=norm if has_norm else None,
                heads_limit="every head has a norm gain of its own" if has_norm else "",
            )
        )
        blocks.append(gated(names, f"{layer}.mlp", "gate_proj", "up_proj", "down_proj"))
    return Architecture("stablelm", tuple(blocks), _untouched(prefix))


def phi3(config: Config, names: Names) -> Architecture:
    """Phi-3: ``qkv_proj`` holds [queries; keys; values], ``gate_up_proj`` [gate; up]."""
    groups, members, size = _sizes(config)
    prefix, layers = _layers(config, names)
    rotary_size = int(size * float(rope_setting(config, "partial_rotary_factor", 1.0)))
    intermediate = int(setting(config, "intermediate_size"))
    keys = groups * members * size
    blocks: list[Attention | FeedForward] = []
    for layer in layers:
        module = f"{layer}.self_attn"
        fused, bias = f"{module}.qkv_proj.weight", names.optional(f"{module}.qkv_proj.bias")
        query = Heads(fused, bias, 0, 0, members * size, size)
        key = Heads(fused, bias, 0, keys, size)
        blocks.append(
            Attention(
                name=module,
                groups=groups,
                members=members,
                parts=score_parts(query, key, size, rotary_size),
                value=Heads(fused, bias, 0, keys + groups * size, size),
                output=columns(f"{module}.o_proj", size, members),
                value_size=size,
                position="rotary",
            )
        )
        both = f"{layer}.mlp.gate_up_proj"
        blocks.append(
            FeedForward(
                name=f"{layer}.mlp",
                size=intermediate,
                gate=units(names, both),
                up=units(names, both, offset=intermediate),
                down=unit_columns(f"{layer}.mlp.down_proj"),
            )
        )
    return Architecture("phi3", tuple(blocks), _untouched(prefix))
