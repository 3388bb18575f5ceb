"""Decoder-only language models with separate (or Llama-style fused) projections and gated feed-forwards.

Llama, Mistral, Qwen2, SmolLM3, Qwen3, Gemma 1-3, StableLM, Cohere, OLMo 2, Phi-3, Mixtral, Qwen3-MoE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import Attention, FeedForward, Heads, Mixture, QueryKeyNorm
from unmergeable.architecture.declare import (
    HEADS_ON_TOP,
    Config,
    Names,
    columns,
    dense_or_experts,
    gated,
    mixtures,
    rope_setting,
    score_parts,
    separate_attention,
    setting,
    unit_columns,
    units,
)
from unmergeable.architecture.streams import language_model_streams, norm, readers_in, with_residuals
from unmergeable.architecture.symmetry import Pairing

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")
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


_PRE_NORM: Mapping[str, tuple[str, ...]] = {"input_layernorm": ("self_attn",), "post_attention_layernorm": ("mlp",)}
_AROUND: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn",),
    "post_attention_layernorm": (),
    "pre_feedforward_layernorm": ("mlp",),
    "post_feedforward_layernorm": (),
}
_POST_NORM: Mapping[str, tuple[str, ...]] = {"post_attention_layernorm": (), "post_feedforward_layernorm": ()}
_PARALLEL: Mapping[str, tuple[str, ...]] = {"input_layernorm": ("self_attn", "mlp")}


def _finished(
    config: Config,
    names: Names,
    prefix: str,
    layers: Sequence[str],
    blocks: Sequence[Attention | FeedForward],
    *,
    layer_norms: Mapping[str, tuple[str, ...]] = _PRE_NORM,
    kind: Literal["rms", "layer"] = "rms",
    offset: float = 0.0,
    is_tied_by_default: bool = False,
    routers: tuple[Mixture, ...] = (),
    untouched: tuple[str, ...] = (),
) -> Architecture:
    """With its stream: ``layer_norms`` names the norms of a layer, and the modules that alone see each one's output."""
    norms = [
        norm(
            names, f"{layer}.{module}", readers_in(blocks, [f"{layer}.{reader}" for reader in readers], routers), offset
        )
        for layer in layers
        for module, readers in layer_norms.items()
    ]
    streams, missing = language_model_streams(
        config,
        names,
        blocks,
        kind,
        embedding=f"{prefix}embed_tokens.weight",
        final=f"{prefix}norm",
        norms=norms,
        mixtures=routers,
        is_tied_by_default=is_tied_by_default,
        offset=offset,
    )
    return with_residuals(
        names,
        str(config["model_type"]),
        blocks,
        (*_untouched(prefix), *untouched),
        streams,
        mixtures=routers,
        missing=missing,
    )


def llama(config: Config, names: Names) -> Architecture:
    """Llama, Mistral, Qwen2, SmolLM3: rotary positions, grouped keys, gated feed-forward."""
    blocks, prefix, layers = _rotary_layers(config, names)
    is_tied = config["model_type"] == "smollm3"
    return _finished(config, names, prefix, layers, blocks, is_tied_by_default=is_tied)


def gemma(config: Config, names: Names) -> Architecture:
    """Gemma and Gemma 2 (which adds norms behind its blocks): gains stored as ``gain - 1``, tied embeddings."""
    blocks, prefix, layers = _rotary_layers(config, names)
    layer_norms = _AROUND if config["model_type"] == "gemma2" else _PRE_NORM
    return _finished(
        config, names, prefix, layers, blocks, layer_norms=layer_norms, offset=1.0, is_tied_by_default=True
    )


def _rotary_layers(
    config: Config, names: Names, pairing: Pairing = "half"
) -> tuple[list[Attention | FeedForward], str, list[str]]:
    """Blocks with rotary positions on whole heads, the prefix of their names, the layers."""
    groups, members, size = _sizes(config)
    prefix, layers = _layers(config, names)
    blocks: list[Attention | FeedForward] = []
    for layer, is_rotary in zip(layers, _rotary_flags(config, len(layers)), strict=True):
        blocks.append(
            separate_attention(
                names,
                f"{layer}.self_attn",
                QKVO,
                groups=groups,
                members=members,
                size=size,
                rotary_size=size if is_rotary else 0,
                pairing=pairing,
            )
        )
        blocks.append(gated(names, f"{layer}.mlp", "gate_proj", "up_proj", "down_proj"))
    return blocks, prefix, layers


def _rotary_flags(config: Config, layers: int) -> list[bool]:
    """For each layer whether it rotates queries and keys: all do, but for some of SmolLM3's."""
    if config["model_type"] != "smollm3":
        return [True] * layers
    interval = int(setting(config, "no_rope_layer_interval", default=4))
    default = [(index + 1) % interval != 0 for index in range(layers)]
    # In spite of its name, a layer's entry in this list is 1 where it has positions.
    return [bool(flag) for flag in setting(config, "no_rope_layers", default=default)]


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
    is_gemma = str(config["model_type"]).startswith("gemma")
    offset = 1.0 if is_gemma else 0.0
    blocks: list[Attention | FeedForward] = []
    for layer in layers:
        module = f"{layer}.self_attn"
        head_norm = _rms_per_head(config, module, offset)
        blocks.append(
            separate_attention(
                names, module, QKVO, groups=groups, members=members, size=size, rotary_size=size, norm=head_norm
            )
        )
        blocks.extend(dense_or_experts(config, names, f"{layer}.mlp", *_GATED))
    return _finished(
        config,
        names,
        prefix,
        layers,
        blocks,
        layer_norms=_AROUND if is_gemma else _PRE_NORM,
        offset=offset,
        is_tied_by_default=is_gemma,
        routers=mixtures(config, names, [f"{layer}.mlp" for layer in layers], _GATED),
        untouched=(r".*\.mlp\.gate\.weight",),
    )


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
        blocks.extend(dense_or_experts(config, names, f"{layer}.block_sparse_moe", *_MIXTRAL))
    return _finished(
        config,
        names,
        prefix,
        layers,
        blocks,
        layer_norms={"input_layernorm": ("self_attn",), "post_attention_layernorm": ("block_sparse_moe",)},
        routers=mixtures(config, names, [f"{layer}.block_sparse_moe" for layer in layers], _MIXTRAL),
        untouched=(r".*\.block_sparse_moe\.gate\.weight",),
    )


def olmo2(config: Config, names: Names) -> Architecture:
    """OLMo 2: an RMS norm over the full width of queries and of keys, norms after the blocks."""
    groups, members, size = _sizes(config)
    prefix = names.prefix("layers.0.self_attn.q_proj.weight", ("model.", ""))
    layers = [f"{prefix}layers.{index}" for index in range(int(setting(config, "num_hidden_layers")))]
    blocks: list[Attention | FeedForward] = []
    for layer in layers:
        module = f"{layer}.self_attn"
        full_norm = QueryKeyNorm(
            "rms",
            "full",
            float(setting(config, "rms_norm_eps", default=1e-5)),
            (f"{module}.q_norm.weight",),
            (f"{module}.k_norm.weight",),
        )
        blocks.append(
            separate_attention(
                names, module, QKVO, groups=groups, members=members, size=size, rotary_size=size, norm=full_norm
            )
        )
        blocks.append(gated(names, f"{layer}.mlp", "gate_proj", "up_proj", "down_proj"))
    return _finished(config, names, prefix, layers, blocks, layer_norms=_POST_NORM)


def cohere(config: Config, names: Names) -> Architecture:
    """Command R: interleaved rotary pairs; the larger models put a LayerNorm on every query and key head."""
    if not config.get("use_qk_norm"):
        blocks, prefix, layers = _rotary_layers(config, names, "interleaved")
        return _cohere_finished(config, names, prefix, layers, blocks)
    groups, members, size = _sizes(config)
    prefix, layers = _layers(config, names)
    blocks = []
    for layer in layers:
        module = f"{layer}.self_attn"
        head_norm = QueryKeyNorm(
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
                norm=head_norm,
                heads_limit="every head has a norm gain of its own",
            )
        )
        blocks.append(gated(names, f"{layer}.mlp", "gate_proj", "up_proj", "down_proj"))
    return _cohere_finished(config, names, prefix, layers, blocks)


def _cohere_finished(
    config: Config, names: Names, prefix: str, layers: Sequence[str], blocks: Sequence[Attention | FeedForward]
) -> Architecture:
    return _finished(
        config, names, prefix, layers, blocks, layer_norms=_PARALLEL, kind="layer", is_tied_by_default=True
    )


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
        head_norm = QueryKeyNorm("layer", "head", epsilon, query_gains, key_gains)
        blocks.append(
            separate_attention(
                names,
                f"{layer}.self_attn",
                QKVO,
                groups=groups,
                members=members,
                size=size,
                rotary_size=rotary_size,
                norm=head_norm if has_norm else None,
                heads_limit="every head has a norm gain of its own" if has_norm else "",
            )
        )
        blocks.append(gated(names, f"{layer}.mlp", "gate_proj", "up_proj", "down_proj"))
    layer_norms = _PARALLEL if config.get("use_parallel_residual") else _PRE_NORM
    return _finished(config, names, prefix, layers, blocks, layer_norms=layer_norms, kind="layer")


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
    return _finished(config, names, prefix, layers, blocks)
