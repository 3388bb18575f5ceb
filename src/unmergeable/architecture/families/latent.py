"""DeepSeek V2 and V3: multi-head latent attention, gated experts.

Every head's score is a plain part (``q_nope`` . ``k_nope``, expanded from a latent) and a rotary part whose key
is shared by all heads and written by ``kv_a_proj_with_mqa`` beside the latent.
"""

from __future__ import annotations

import re

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import Attention, FeedForward, Heads, Latent, ScorePart
from unmergeable.architecture.declare import (
    HEADS_ON_TOP,
    Config,
    Names,
    columns,
    dense_or_experts,
    gated,
    mixtures,
    setting,
)
from unmergeable.architecture.streams import language_model_streams, norm, readers_in, with_residuals
from unmergeable.architecture.symmetry import Pairing


def deepseek(config: Config, names: Names) -> Architecture:
    """DeepSeek V2 / V3. Pairs are interleaved; V3 can say otherwise with ``rope_interleave``."""
    heads = int(setting(config, "num_attention_heads"))
    plain = int(setting(config, "qk_nope_head_dim"))
    rotary = int(setting(config, "qk_rope_head_dim"))
    value = int(setting(config, "v_head_dim"))
    rank = int(setting(config, "kv_lora_rank"))
    pairing: Pairing = "interleaved" if config.get("rope_interleave", True) else "half"
    prefix = names.prefix("layers.0.input_layernorm.weight", ("model.", ""))
    layers = [f"{prefix}layers.{index}" for index in range(int(setting(config, "num_hidden_layers")))]
    epsilon = float(setting(config, "rms_norm_eps", default=1e-6))
    blocks: list[Attention | FeedForward] = []
    for layer in layers:
        module = f"{layer}.self_attn"
        has_latent_query = setting(config, "q_lora_rank", default=f"{module}.q_b_proj.weight" in names)
        query = f"{module}.q_b_proj.weight" if has_latent_query else f"{module}.q_proj.weight"
        expand, compress = f"{module}.kv_b_proj.weight", f"{module}.kv_a_proj_with_mqa"
        query_stride, expand_stride = plain + rotary, plain + value
        latents = [_latent(names, module, "kv_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", rank, epsilon)]
        if has_latent_query:
            query_rank = names.shapes.get(query, (0, 0))[1]
            latents.append(_latent(names, module, "q_b_proj", "q_a_proj", "q_a_layernorm", query_rank, epsilon))
        blocks.append(
            Attention(
                name=module,
                groups=heads,
                members=1,
                parts=(
                    ScorePart(Heads(query, None, 0, 0, query_stride), Heads(expand, None, 0, 0, expand_stride), plain),
                    ScorePart(
                        Heads(query, None, 0, plain, query_stride),
                        Heads(f"{compress}.weight", names.optional(f"{compress}.bias"), 0, rank, 0),
                        rotary,
                        pairing,
                        shared_key=True,
                    ),
                ),
                value=Heads(expand, None, 0, plain, expand_stride),
                output=columns(f"{module}.o_proj", value),
                value_size=value,
                position="rotary",
                latents=tuple(latents),
            )
        )
        blocks.extend(_feed_forwards(config, names, f"{layer}.mlp"))
    untouched = (
        HEADS_ON_TOP,
        r".*embed_tokens\.weight",
        r".*norm\.(weight|bias)",
        r".*\.self_attn\.q_a_proj\.(weight|bias)",
        r".*\.mlp\.gate\.(weight|e_score_correction_bias)",
        r".*rotary_emb\.inv_freq",
        *_prediction_layers(names, f"{prefix}layers.", len(layers)),
    )
    is_ungrouped = config.get("topk_method") == "greedy" or not config.get("n_group")
    groups = 1 if is_ungrouped else int(setting(config, "n_group"))
    routers = mixtures(config, names, [f"{layer}.mlp" for layer in layers], _PROJECTIONS, groups)
    norms = [
        norm(names, f"{layer}.{module}", readers_in(blocks, [f"{layer}.{reader}"], routers))
        for layer in layers
        for module, reader in (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
    ]
    streams, missing = language_model_streams(
        config,
        names,
        blocks,
        "rms",
        embedding=f"{prefix}embed_tokens.weight",
        final=f"{prefix}norm",
        norms=norms,
        mixtures=routers,
    )
    return with_residuals(
        names,
        str(config["model_type"]),
        blocks,
        untouched,
        streams,
        mixtures=routers,
        aside=(r".*\.self_attn\.(kv|q)_a_layernorm\.weight", r".*\.self_attn\.(q_a_proj|kv_a_proj_with_mqa)\.bias"),
        missing=missing,
    )


def _prediction_layers(names: Names, stack: str, count: int) -> list[str]:
    """Patterns of the layers behind the ``count`` of the network, which predict further tokens from its stream.

    transformers passes over them. They stay as they are, and with them the stream that they read.
    """
    numbers = {name.removeprefix(stack).partition(".")[0] for name in names.shapes if name.startswith(stack)}
    beyond = sorted(int(number) for number in numbers if number.isdigit() and int(number) >= count)
    return [rf"{re.escape(stack)}{number}\..*" for number in beyond]


def _latent(names: Names, module: str, expand: str, compress: str, gain: str, size: int, epsilon: float) -> Latent:
    bias = names.optional(f"{module}.{compress}.bias")
    return Latent(
        f"{module}.{expand}.weight", f"{module}.{compress}.weight", bias, f"{module}.{gain}.weight", size, epsilon
    )


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _feed_forwards(config: Config, names: Names, module: str) -> list[FeedForward]:
    routed = dense_or_experts(config, names, module, *_PROJECTIONS)
    shared = f"{module}.shared_experts"
    return [*routed, gated(names, shared, *_PROJECTIONS)] if f"{shared}.up_proj.weight" in names else routed
