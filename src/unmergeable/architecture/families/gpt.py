"""Older decoder-only families, each with its own storage: GPT-2, GPT-J, GPT-NeoX, OPT, BLOOM, Falcon, Phi."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import Attention, FeedForward, Heads, Position, QueryKeyNorm
from unmergeable.architecture.declare import (
    HEADS_ON_TOP,
    Config,
    Names,
    columns,
    plain,
    rope_setting,
    score_parts,
    separate_attention,
    setting,
)
from unmergeable.architecture.residual import StreamAxis
from unmergeable.architecture.streams import language_model_streams, norm, readers_in, reads, with_residuals, writes

_NORMS = r".*\b\w*(ln_\w+|norm|layernorm|layer_norm)\.(weight|bias)"
_BUFFERS = r".*\.attn\.(bias|masked_bias)|.*\.attention\.(bias|masked_bias)|.*rotary_emb\.inv_freq"


def _finished(
    config: Config,
    names: Names,
    blocks: Sequence[Attention | FeedForward],
    untouched: tuple[str, ...],
    *,
    embedding: str,
    final: str | None,
    norms: Mapping[str, Sequence[str]],
    embedding_axis: int = -1,
    others: Sequence[StreamAxis] = (),
    heads: Sequence[StreamAxis] | None = None,
    aside: Sequence[str] = (),
    is_tied_by_default: bool = True,
    followers: Mapping[str, str] | None = None,
    positions: str | None = None,
    parallel: Sequence[Sequence[str]] = (),
) -> Architecture:
    """With its stream under LayerNorms: ``norms`` gives for each the blocks that alone see its output.

    ``followers``: for norms whose output is the stream, the block that reads it next. ``positions`` and ``parallel`` as
    in :func:`language_model_streams`.
    """
    then = followers or {}
    streams, missing = language_model_streams(
        config,
        names,
        blocks,
        "layer",
        embedding=embedding,
        final=final,
        norms=[
            norm(names, module, readers_in(blocks, readers), then=then.get(module, ""))
            for module, readers in norms.items()
        ],
        embedding_axis=embedding_axis,
        others=others,
        heads=heads,
        is_tied_by_default=is_tied_by_default,
        positions=positions,
        parallel=parallel,
    )
    return with_residuals(names, str(config["model_type"]), blocks, untouched, streams, aside=aside, missing=missing)


def gpt2(config: Config, names: Names) -> Architecture:
    """GPT-2: weights stored ``[in, out]``, columns [queries | keys | values]."""
    heads, hidden = int(setting(config, "n_head")), int(setting(config, "n_embd"))
    size = hidden // heads
    prefix = names.prefix("h.0.ln_1.weight", ("transformer.", ""))
    blocks: list[Attention | FeedForward] = []
    for index in range(int(setting(config, "n_layer"))):
        layer = f"{prefix}h.{index}"
        fused, bias = f"{layer}.attn.c_attn.weight", names.optional(f"{layer}.attn.c_attn.bias")
        query, key, value = (Heads(fused, bias, 1, part * hidden, size) for part in range(3))
        blocks.append(
            Attention(
                name=f"{layer}.attn",
                groups=heads,
                members=1,
                parts=score_parts(query, key, size),
                value=value,
                output=Heads(f"{layer}.attn.c_proj.weight", None, 0, 0, size),
                value_size=size,
                position="none",
            )
        )
        up = f"{layer}.mlp.c_fc"
        blocks.append(
            FeedForward(
                name=f"{layer}.mlp",
                size=names.shapes.get(f"{up}.weight", (0, 0))[1],
                up=Heads(f"{up}.weight", names.optional(f"{up}.bias"), 1, 0, 0),
                down=Heads(f"{layer}.mlp.c_proj.weight", None, 0, 0, 0),
                activation="relu" if config.get("activation_function") == "relu" else "other",
            )
        )
    norms: dict[str, list[str]] = {}
    for index in range(int(setting(config, "n_layer"))):
        layer = f"{prefix}h.{index}"
        norms |= {f"{layer}.ln_1": [f"{layer}.attn"], f"{layer}.ln_2": [f"{layer}.mlp"]}
    return _finished(
        config,
        names,
        blocks,
        (HEADS_ON_TOP, _NORMS, _BUFFERS, r".*\bw[tp]e\.weight"),
        embedding=f"{prefix}wte.weight",
        final=f"{prefix}ln_f",
        norms=norms,
        others=writes(names, f"{prefix}wpe.weight"),
        positions=f"{prefix}wpe.weight",
    )


def gptj(config: Config, names: Names) -> Architecture:
    """GPT-J: interleaved rotary pairs on the first ``rotary_dim`` coordinates of each head."""
    heads = int(setting(config, "n_head"))
    size = int(setting(config, "n_embd")) // heads
    prefix = names.prefix("h.0.ln_1.weight", ("transformer.", ""))
    activation = str(setting(config, "activation_function", default="gelu_new"))
    blocks: list[Attention | FeedForward] = []
    for index in range(int(setting(config, "n_layer"))):
        layer = f"{prefix}h.{index}"
        blocks.append(
            separate_attention(
                names,
                f"{layer}.attn",
                ("q_proj", "k_proj", "v_proj", "out_proj"),
                groups=heads,
                size=size,
                rotary_size=int(setting(config, "rotary_dim", default=size)),
                pairing="interleaved",
            )
        )
        blocks.append(plain(names, f"{layer}.mlp", f"{layer}.mlp.fc_in", f"{layer}.mlp.fc_out", activation))
    layers = [f"{prefix}h.{index}" for index in range(int(setting(config, "n_layer")))]
    return _finished(
        config,
        names,
        blocks,
        (HEADS_ON_TOP, _NORMS, _BUFFERS, r".*\bwte\.weight"),
        embedding=f"{prefix}wte.weight",
        final=f"{prefix}ln_f",
        norms={f"{layer}.ln_1": [f"{layer}.attn", f"{layer}.mlp"] for layer in layers},
        parallel=[(f"{layer}.attn", f"{layer}.mlp") for layer in layers],
        is_tied_by_default=False,
    )


def _fused_per_head(
    names: Names,
    module: str,
    dense: str,
    *,
    heads: int,
    size: int,
    rotary_size: int = 0,
    position: Position = "none",
    heads_limit: str = "",
) -> Attention:
    """``query_key_value`` with rows [head, (query, key, value), coordinate]."""
    fused, bias = f"{module}.query_key_value.weight", names.optional(f"{module}.query_key_value.bias")
    query, key, value = (Heads(fused, bias, 0, part * size, 3 * size) for part in range(3))
    return Attention(
        name=module,
        groups=heads,
        members=1,
        parts=score_parts(query, key, size, rotary_size),
        value=value,
        output=columns(dense, size),
        value_size=size,
        position="rotary" if rotary_size else position,
        heads_limit=heads_limit,
    )


def gpt_neox(config: Config, names: Names) -> Architecture:
    """GPT-NeoX, Pythia: fused rows per head, rotary positions on part of each head."""
    heads = int(setting(config, "num_attention_heads"))
    size = int(setting(config, "hidden_size")) // heads
    share = float(rope_setting(config, "partial_rotary_factor", setting(config, "rotary_pct", default=0.25)))
    prefix = names.prefix("layers.0.input_layernorm.weight", ("gpt_neox.", ""))
    activation = str(setting(config, "hidden_act", default="gelu"))
    blocks: list[Attention | FeedForward] = []
    for index in range(int(setting(config, "num_hidden_layers"))):
        layer = f"{prefix}layers.{index}"
        module = f"{layer}.attention"
        blocks.append(
            _fused_per_head(names, module, f"{module}.dense", heads=heads, size=size, rotary_size=int(size * share))
        )
        blocks.append(_dense_4h(names, layer, activation))
    norms: dict[str, list[str]] = {}
    for index in range(int(setting(config, "num_hidden_layers"))):
        layer = f"{prefix}layers.{index}"
        # In parallel or one after the other, each has a norm of its own.
        norms |= {
            f"{layer}.input_layernorm": [f"{layer}.attention"],
            f"{layer}.post_attention_layernorm": [f"{layer}.mlp"],
        }
    return _finished(
        config,
        names,
        blocks,
        (HEADS_ON_TOP, _NORMS, _BUFFERS, r"embed_out\.weight", r".*\bembed_in\.weight"),
        embedding=f"{prefix}embed_in.weight",
        final=f"{prefix}final_layer_norm",
        norms=norms,
        parallel=_in_parallel(blocks) if setting(config, "use_parallel_residual", default=True) else (),
        is_tied_by_default=False,
    )


def _in_parallel(blocks: Sequence[Attention | FeedForward]) -> list[tuple[str, str]]:
    """Attention and feed-forward of every layer, which follow each other in ``blocks``."""
    return [(attention.name, other.name) for attention, other in zip(blocks[::2], blocks[1::2], strict=True)]


def _dense_4h(names: Names, layer: str, activation: str) -> FeedForward:
    module = f"{layer}.mlp"
    return plain(names, module, f"{module}.dense_h_to_4h", f"{module}.dense_4h_to_h", activation)


_ALIBI = "every head has an ALiBi slope of its own, fixed by its place"


def bloom(config: Config, names: Names) -> Architecture:
    """BLOOM: fused rows per head, ALiBi positions."""
    heads = int(setting(config, "n_head", "num_attention_heads"))
    size = int(setting(config, "hidden_size", "n_embed")) // heads
    prefix = names.prefix("h.0.input_layernorm.weight", ("transformer.", ""))
    blocks: list[Attention | FeedForward] = []
    for index in range(int(setting(config, "n_layer", "num_hidden_layers"))):
        layer = f"{prefix}h.{index}"
        module = f"{layer}.self_attention"
        blocks.append(
            _fused_per_head(
                names, module, f"{module}.dense", heads=heads, size=size, position="alibi", heads_limit=_ALIBI
            )
        )
        blocks.append(_dense_4h(names, layer, "gelu"))
    norms: dict[str, list[str]] = {f"{prefix}word_embeddings_layernorm": []}
    for index in range(int(setting(config, "n_layer", "num_hidden_layers"))):
        layer = f"{prefix}h.{index}"
        norms |= _layer_norms(config, names, layer)
    return _finished(
        config,
        names,
        blocks,
        (HEADS_ON_TOP, _NORMS, _BUFFERS, r".*word_embeddings(_layernorm)?\.(weight|bias)"),
        embedding=f"{prefix}word_embeddings.weight",
        final=f"{prefix}ln_f",
        norms=norms,
    )


def _layer_norms(config: Config, names: Names, layer: str) -> dict[str, list[str]]:
    """The norms of a BLOOM or Falcon layer and who reads each; none reads one whose output is added to the stream."""
    attention, feed_forward = f"{layer}.self_attention", f"{layer}.mlp"
    if f"{layer}.ln_attn.weight" in names:
        return {f"{layer}.ln_attn": [attention], f"{layer}.ln_mlp": [feed_forward]}
    if f"{layer}.post_attention_layernorm.weight" not in names:
        return {f"{layer}.input_layernorm": [attention, feed_forward]}
    # With this setting BLOOM adds a norm's output, not its input, to what the block computes.
    from_norm = bool(config.get("apply_residual_connection_post_layernorm"))
    readers = ([], []) if from_norm else ([attention], [feed_forward])
    return {f"{layer}.input_layernorm": readers[0], f"{layer}.post_attention_layernorm": readers[1]}


def falcon(config: Config, names: Names) -> Architecture:
    """Falcon in its three storages: 40B [group, (queries, key, value)], 7B [queries | key | value], RW per head."""
    heads = int(setting(config, "num_attention_heads", "n_head"))
    size = int(setting(config, "hidden_size")) // heads
    is_alibi = bool(config.get("alibi"))
    if config.get("new_decoder_architecture"):
        groups = int(setting(config, "num_kv_heads", "n_head_kv", default=heads))
    else:
        groups = 1 if config.get("multi_query", True) else heads
    members = heads // groups
    stride = (members + 2) * size
    prefix = names.prefix("word_embeddings.weight", ("transformer.", ""))
    blocks: list[Attention | FeedForward] = []
    for index in range(int(setting(config, "num_hidden_layers", "n_layer"))):
        layer = f"{prefix}h.{index}"
        module = f"{layer}.self_attention"
        fused, bias = f"{module}.query_key_value.weight", names.optional(f"{module}.query_key_value.bias")
        query = Heads(fused, bias, 0, 0, stride, size)
        key = Heads(fused, bias, 0, members * size, stride)
        blocks.append(
            Attention(
                name=module,
                groups=groups,
                members=members,
                parts=score_parts(query, key, size, 0 if is_alibi else size),
                value=Heads(fused, bias, 0, (members + 1) * size, stride),
                output=columns(f"{module}.dense", size, members),
                value_size=size,
                position="alibi" if is_alibi else "rotary",
                heads_limit=_ALIBI if is_alibi else "",
            )
        )
        blocks.append(_dense_4h(names, layer, str(setting(config, "activation", default="gelu"))))
    untouched = (HEADS_ON_TOP, _NORMS, r".*\bln_(attn|mlp|f)\.(weight|bias)", r".*word_embeddings\.weight", _BUFFERS)
    is_parallel = bool(config.get("new_decoder_architecture") or config.get("parallel_attn", True))
    norms: dict[str, list[str]] = {}
    for index in range(int(setting(config, "num_hidden_layers", "n_layer"))):
        norms |= _layer_norms(config, names, f"{prefix}h.{index}")
    return _finished(
        config,
        names,
        blocks,
        untouched,
        embedding=f"{prefix}word_embeddings.weight",
        final=f"{prefix}ln_f",
        norms=norms,
        parallel=_in_parallel(blocks) if is_parallel else (),
    )


def opt(config: Config, names: Names) -> Architecture:
    """OPT: learned positions, ReLU feed-forward."""
    heads = int(setting(config, "num_attention_heads"))
    size = int(setting(config, "hidden_size")) // heads
    prefix = names.prefix("layers.0.fc1.weight", ("model.decoder.", "decoder.", ""))
    activation = str(setting(config, "activation_function", default="relu"))
    blocks: list[Attention | FeedForward] = []
    for index in range(int(setting(config, "num_hidden_layers"))):
        layer = f"{prefix}layers.{index}"
        blocks.append(
            separate_attention(
                names, f"{layer}.self_attn", ("q_proj", "k_proj", "v_proj", "out_proj"), groups=heads, size=size
            )
        )
        blocks.append(plain(names, layer, f"{layer}.fc1", f"{layer}.fc2", activation))
    is_pre_norm = bool(setting(config, "do_layer_norm_before", default=True))
    norms: dict[str, list[str]] = {}
    followers: dict[str, str] = {}
    for index in range(int(setting(config, "num_hidden_layers"))):
        layer = f"{prefix}layers.{index}"
        readers = ([f"{layer}.self_attn"], [layer]) if is_pre_norm else ([], [])
        if not is_pre_norm:
            followers[f"{layer}.self_attn_layer_norm"] = layer
            if index:
                followers[f"{prefix}layers.{index - 1}.final_layer_norm"] = f"{layer}.self_attn"
        norms |= {f"{layer}.self_attn_layer_norm": readers[0], f"{layer}.final_layer_norm": readers[1]}
    # The 350M model embeds in a narrower space and projects into the stream and out of it.
    is_narrow = f"{prefix}project_in.weight" in names
    has_final = f"{prefix}final_layer_norm.weight" in names
    return _finished(
        config,
        names,
        blocks,
        (HEADS_ON_TOP, _NORMS, r".*embed_(tokens|positions)\.weight", r".*project_(in|out)\.weight"),
        embedding=f"{prefix}project_in.weight" if is_narrow else f"{prefix}embed_tokens.weight",
        final=f"{prefix}final_layer_norm" if has_final else None,
        norms=norms,
        embedding_axis=0 if is_narrow else -1,
        others=writes(names, f"{prefix}embed_positions.weight"),
        positions=f"{prefix}embed_positions.weight",
        heads=reads(names, f"{prefix}project_out.weight") if is_narrow else None,
        aside=(r".*embed_tokens\.weight", r"lm_head\.weight") if is_narrow else (),
        followers=followers,
    )


def phi(config: Config, names: Names) -> Architecture:
    """Phi-1/2: biases everywhere, rotary positions on part of each head, optionally a LayerNorm on queries and keys."""
    heads = int(setting(config, "num_attention_heads"))
    groups = int(setting(config, "num_key_value_heads", default=heads))
    size = int(setting(config, "hidden_size")) // heads
    rotary_size = int(size * float(rope_setting(config, "partial_rotary_factor", 0.5)))
    prefix = names.prefix("layers.0.mlp.fc1.weight", ("model.", ""))
    activation = str(setting(config, "hidden_act", default="gelu_new"))
    blocks: list[Attention | FeedForward] = []
    for index in range(int(setting(config, "num_hidden_layers"))):
        layer = f"{prefix}layers.{index}"
        module = f"{layer}.self_attn"
        head_norm = None
        if config.get("qk_layernorm"):
            head_norm = QueryKeyNorm(
                "layer",
                "head",
                float(setting(config, "layer_norm_eps", default=1e-5)),
                (f"{module}.q_layernorm.weight",),
                (f"{module}.k_layernorm.weight",),
                f"{module}.q_layernorm.bias",
                f"{module}.k_layernorm.bias",
            )
        blocks.append(
            separate_attention(
                names,
                module,
                ("q_proj", "k_proj", "v_proj", "dense"),
                groups=groups,
                members=heads // groups,
                size=size,
                rotary_size=rotary_size,
                norm=head_norm,
            )
        )
        blocks.append(plain(names, f"{layer}.mlp", f"{layer}.mlp.fc1", f"{layer}.mlp.fc2", activation))
    layers = [f"{prefix}layers.{index}" for index in range(int(setting(config, "num_hidden_layers")))]
    return _finished(
        config,
        names,
        blocks,
        (HEADS_ON_TOP, _NORMS, _BUFFERS, r".*embed_tokens\.weight"),
        embedding=f"{prefix}embed_tokens.weight",
        final=f"{prefix}final_layernorm",
        norms={f"{layer}.input_layernorm": [f"{layer}.self_attn", f"{layer}.mlp"] for layer in layers},
        parallel=_in_parallel(blocks),
        is_tied_by_default=False,
    )
