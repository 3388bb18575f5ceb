"""Encoders of text and of images: BERT, RoBERTa, ModernBERT, ViT, DINOv2, CLIP, SigLIP."""

from __future__ import annotations

from collections.abc import Mapping

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import Attention, FeedForward, Heads
from unmergeable.architecture.declare import (
    HEADS_ON_TOP,
    Config,
    Names,
    columns,
    plain,
    score_parts,
    separate_attention,
    setting,
    unit_columns,
    units,
)
from unmergeable.architecture.residual import Norm, Residual, Rows, StreamAxis
from unmergeable.architecture.streams import (
    EXPOSED,
    linear,
    norm,
    readers_in,
    reads,
    residual,
    scales,
    with_residuals,
    writes,
)

_EMBEDDINGS = r"(.*\.)?embeddings\..*"
_NORMS = r".*\b\w*(norm\w*|LayerNorm|layernorm\w*|layrnorm)\.(weight|bias|gamma|beta)"


def _heads(config: Config, default_heads: int, default_hidden: int) -> tuple[int, int]:
    heads = int(setting(config, "num_attention_heads", default=default_heads))
    return heads, int(setting(config, "hidden_size", default=default_hidden)) // heads


def bert(config: Config, names: Names) -> Architecture:
    """BERT, RoBERTa, XLM-RoBERTa: ``attention.self.query`` and friends, norms after the blocks."""
    heads, size = _heads(config, 12, 768)
    anchor = "encoder.layer.0.attention.self.query.weight"
    prefix = names.prefix(anchor, ("", "bert.", "roberta.", "model."))
    activation = str(setting(config, "hidden_act", default="gelu"))
    blocks: list[Attention | FeedForward] = []
    for index in range(int(setting(config, "num_hidden_layers", default=12))):
        layer = f"{prefix}encoder.layer.{index}"
        projections = ("self.query", "self.key", "self.value", "output.dense")
        blocks.append(separate_attention(names, f"{layer}.attention", projections, groups=heads, size=size))
        blocks.append(plain(names, layer, f"{layer}.intermediate.dense", f"{layer}.output.dense", activation))
    # A cross-encoder or decoder variant has weights no block above owns: they stay unclaimed, and are refused.
    untouched = (HEADS_ON_TOP, _EMBEDDINGS, _NORMS, r".*\bpooler\.dense\.(weight|bias)")
    readers, aside = _bert_heads(names, prefix)
    embeddings = [f"{prefix}embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
    after = [f"{prefix}embeddings.LayerNorm"]
    for index in range(int(setting(config, "num_hidden_layers", default=12))):
        layer = f"{prefix}encoder.layer.{index}"
        after += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    followers = [*(block.name for block in blocks), ""]
    # The output head of a masked language model is the embedding of words, which so keeps its constants.
    has_head = any(f"{module}.dense.weight" in names for module in ("cls.predictions.transform", "lm_head"))
    is_tied = has_head and bool(setting(config, "tie_word_embeddings", default=True))
    stream = residual(
        names,
        "residual",
        names.shapes[embeddings[0]][1],
        "layer",
        embeddings=writes(names, *embeddings),
        blocks=blocks,
        norms=[norm(names, module, then=then) for module, then in zip(after, followers, strict=True)],
        others=readers,
        is_exposed=not readers,
        sums=[[Rows(name) for name in embeddings[is_tied:]]],
    )
    missing = {} if readers else {"residual": EXPOSED}
    return with_residuals(names, str(config["model_type"]), blocks, untouched, [stream], aside=aside, missing=missing)


def _bert_heads(names: Names, prefix: str) -> tuple[list[StreamAxis], tuple[str, ...]]:
    """What reads the stream of a BERT or RoBERTa model, and the tensors behind that; nothing for a bare encoder.

    The masked language model's head maps the stream through a GELU to the coordinates of the embedding it is tied to:
    its rows take the order of the stream but not the sign, which its LayerNorm adds.
    """
    aside: tuple[str, ...] = (r"cls\.predictions\.(decoder\.)?bias", r"lm_head\.(decoder\.)?bias", r".*\.dense\.bias")
    pooler = f"{prefix}pooler.dense.weight"
    for module, layer_norm in (
        ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        ("lm_head.dense", "lm_head.layer_norm"),
    ):
        if f"{module}.weight" in names:
            decoder = f"{module.split('.')[0]}{'.predictions' if module.startswith('cls') else ''}.decoder.weight"
            rows = scales(names, f"{module}.weight", f"{module}.bias")
            signed = writes(names, *(f"{layer_norm}.{kind}" for kind in ("weight", "bias", "gamma", "beta")))
            # A model for pretraining has the pooler and its next-sentence head as well.
            heads = reads(names, f"{module}.weight", decoder, pooler)
            return [*heads, *rows, *signed], (*aside, r"cls\.seq_relationship\.(weight|bias)")
    if pooler in names:
        on_top = [name for name in names.shapes if name.startswith(("classifier.", "cls."))]
        return (reads(names, pooler) if on_top else []), (*aside, r"(classifier|cls)\..*")
    if "classifier.dense.weight" in names:
        return reads(names, "classifier.dense.weight"), (*aside, r"classifier\.out_proj\.(weight|bias)")
    return reads(names, "classifier.weight", "qa_outputs.weight"), aside


def modernbert(config: Config, names: Names) -> Architecture:
    """ModernBERT: rotary positions; ``Wqkv`` holds [queries; keys; values], ``Wi`` [gate; up]; norms before blocks."""
    heads, size = _heads(config, 12, 768)
    prefix = names.prefix("layers.0.attn.Wqkv.weight", ("model.", ""))
    layers = [f"{prefix}layers.{index}" for index in range(int(setting(config, "num_hidden_layers", default=22)))]
    intermediate = int(setting(config, "intermediate_size", default=1152))
    blocks: list[Attention | FeedForward] = []
    for layer in layers:
        fused, bias = f"{layer}.attn.Wqkv.weight", names.optional(f"{layer}.attn.Wqkv.bias")
        query, key, value = (Heads(fused, bias, 0, part * heads * size, size) for part in range(3))
        blocks.append(
            Attention(
                name=f"{layer}.attn",
                groups=heads,
                members=1,
                parts=score_parts(query, key, size, size),
                value=value,
                output=columns(f"{layer}.attn.Wo", size),
                value_size=size,
                position="rotary",
            )
        )
        blocks.append(
            FeedForward(
                name=f"{layer}.mlp",
                size=intermediate,
                gate=units(names, f"{layer}.mlp.Wi"),
                up=units(names, f"{layer}.mlp.Wi", offset=intermediate),
                down=unit_columns(f"{layer}.mlp.Wo"),
            )
        )
    family = str(config["model_type"])
    untouched = (r"(head|decoder|classifier)\..*", r".*\bembeddings\..*", r".*norm\.(weight|bias)")
    dense = reads(names, "head.dense.weight")
    if not dense:
        return with_residuals(names, family, blocks, untouched, (), missing={"residual": EXPOSED})
    embedding = f"{prefix}embeddings.tok_embeddings.weight"
    norms = [norm(names, f"{prefix}embeddings.norm"), norm(names, f"{prefix}final_norm", dense)]
    for index, layer in enumerate(layers):
        if index:  # the first layer reads what the norm of the embeddings gives out
            norms.append(norm(names, f"{layer}.attn_norm", readers_in(blocks, [f"{layer}.attn"])))
        norms.append(norm(names, f"{layer}.mlp_norm", readers_in(blocks, [f"{layer}.mlp"])))
    # The masked language model's head ends in the coordinates of the embedding it is tied to; see _bert_heads.
    tied: list[StreamAxis] = []
    if "classifier.weight" not in names:
        tied = [
            *reads(names, "decoder.weight"),
            *scales(names, "head.dense.weight", "head.dense.bias"),
            *writes(names, "head.norm.weight", "head.norm.bias"),
        ]
    stream = residual(
        names,
        "residual",
        names.shapes[embedding][1],
        "layer",
        embeddings=writes(names, embedding),
        blocks=blocks,
        norms=norms,
        others=tied,
    )
    aside = (r"decoder\.bias", r"head\.dense\.bias", r"head\.norm\.(weight|bias)", r"classifier\.(weight|bias)")
    return with_residuals(names, family, blocks, untouched, [stream], aside=aside)


def vit(config: Config, names: Names) -> Architecture:
    """ViT: on-disk names ``attention.attention.query``."""
    heads, size = _heads(config, 12, 768)
    prefix = names.prefix("encoder.layer.0.attention.attention.query.weight", ("vit.", ""))
    activation = str(setting(config, "hidden_act", default="gelu"))
    blocks: list[Attention | FeedForward] = []
    for index in range(int(setting(config, "num_hidden_layers", default=12))):
        layer = f"{prefix}encoder.layer.{index}"
        blocks.append(_vit_attention(names, layer, heads, size))
        blocks.append(plain(names, layer, f"{layer}.intermediate.dense", f"{layer}.output.dense", activation))
    untouched = (HEADS_ON_TOP, _EMBEDDINGS, _NORMS, r".*\bdecoder\.0\..*")
    return _vision_architecture(config, names, prefix, blocks, untouched, ("layernorm_before", "layernorm_after"))


def _vision_architecture(
    config: Config,
    names: Names,
    prefix: str,
    blocks: list[Attention | FeedForward],
    untouched: tuple[str, ...],
    layer_norms: tuple[str, str],
) -> Architecture:
    """ViT or DINOv2 with its stream, if a classifier reads it; DINOv2's reads [class token | mean of the patches]."""
    family = str(config["model_type"])
    size = names.shapes.get(f"{prefix}layernorm.weight", (0,))[0]
    if not size:
        return with_residuals(names, family, blocks, untouched, (), missing={"residual": EXPOSED})
    is_exposed = "classifier.weight" not in names
    head = [] if is_exposed else reads(names, "classifier.weight", copies=names.shapes["classifier.weight"][1] // size)
    norms = []
    layer_scales: dict[str, str] = {}
    layers = [
        f"{prefix}encoder.layer.{index}" for index in range(int(setting(config, "num_hidden_layers", default=12)))
    ]
    for layer in layers:
        feed_forward = layer if any(block.name == layer for block in blocks) else f"{layer}.mlp"
        for module, reader in zip(layer_norms, (f"{layer}.attention", feed_forward), strict=True):
            norms.append(norm(names, f"{layer}.{module}", readers_in(blocks, [reader])))
        for number, block in ((1, f"{layer}.attention"), (2, feed_forward)):
            if f"{layer}.layer_scale{number}.lambda1" in names:
                layer_scales[f"{layer}.layer_scale{number}.lambda1"] = block
    inner = f"{prefix}embeddings"
    tokens = (f"{inner}.{name}" for name in ("cls_token", "mask_token", "register_tokens", "position_embeddings"))
    patches = Rows(f"{inner}.patch_embeddings.projection.bias", twins=(f"{inner}.mask_token",))
    positions = f"{inner}.position_embeddings"
    stream = residual(
        names,
        "residual",
        size,
        "layer",
        embeddings=linear(names, f"{prefix}embeddings.patch_embeddings.projection"),
        blocks=blocks,
        norms=[*norms, norm(names, f"{prefix}layernorm", head)],
        others=writes(names, *tokens),
        layer_scales=layer_scales,
        is_exposed=is_exposed,
        is_normed_out=True,
        sums=[(Rows(f"{inner}.cls_token"), Rows(positions, last=1)), (patches, Rows(positions, first=1))],
    )
    missing = {"residual": EXPOSED} if is_exposed else {}
    return with_residuals(names, family, blocks, untouched, [stream], missing=missing)


def _vit_attention(names: Names, layer: str, heads: int, size: int) -> Attention:
    projections = ("attention.query", "attention.key", "attention.value", "output.dense")
    return separate_attention(names, f"{layer}.attention", projections, groups=heads, size=size)


def dinov2(config: Config, names: Names) -> Architecture:
    """DINOv2: ViT attention; a plain feed-forward, or a gated one with ``weights_in`` = [gate; up]."""
    heads, size = _heads(config, 12, 768)
    prefix = names.prefix("encoder.layer.0.attention.attention.query.weight", ("dinov2.", "", "backbone."))
    activation = str(setting(config, "hidden_act", default="gelu"))
    blocks: list[Attention | FeedForward] = []
    for index in range(int(setting(config, "num_hidden_layers", default=12))):
        layer = f"{prefix}encoder.layer.{index}"
        blocks.append(_vit_attention(names, layer, heads, size))
        module = f"{layer}.mlp"
        if setting(config, "use_swiglu_ffn", default=f"{module}.weights_in.weight" in names):
            width = names.shapes.get(f"{module}.weights_in.weight", (0,))[0] // 2
            blocks.append(
                FeedForward(
                    name=module,
                    size=width,
                    gate=units(names, f"{module}.weights_in"),
                    up=units(names, f"{module}.weights_in", offset=width),
                    down=unit_columns(f"{module}.weights_out"),
                )
            )
        else:
            blocks.append(plain(names, module, f"{module}.fc1", f"{module}.fc2", activation))
    untouched = (HEADS_ON_TOP, _EMBEDDINGS, _NORMS, r".*\.layer_scale[12]\.lambda1")
    return _vision_architecture(config, names, prefix, blocks, untouched, ("norm1", "norm2"))


def _tower(
    names: Names, prefix: str, layers: int, heads: int, size: int, activation: str
) -> list[Attention | FeedForward]:
    blocks: list[Attention | FeedForward] = []
    for index in range(layers):
        layer = f"{prefix}encoder.layers.{index}"
        projections = ("q_proj", "k_proj", "v_proj", "out_proj")
        blocks.append(separate_attention(names, f"{layer}.self_attn", projections, groups=heads, size=size))
        blocks.append(plain(names, f"{layer}.mlp", f"{layer}.mlp.fc1", f"{layer}.mlp.fc2", activation))
    return blocks


_TOWER_DEFAULTS = {
    "clip": {"text": (8, 512, "quick_gelu"), "vision": (12, 768, "quick_gelu")},
    "siglip": {"text": (12, 768, "gelu_pytorch_tanh"), "vision": (12, 768, "gelu_pytorch_tanh")},
}


def clip(config: Config, names: Names) -> Architecture:
    """CLIP and SigLIP, both towers or either one; SigLIP's pooling attention stores [queries; keys; values]."""
    model_type = str(config["model_type"])
    kind = "siglip" if model_type.startswith("siglip") else "clip"
    blocks: list[Attention | FeedForward] = []
    streams: list[Residual] = []
    missing: dict[str, str] = {}
    for tower in ("text", "vision"):
        if model_type.endswith(f"{tower}_model"):
            section: Config = config
            prefix = names.prefix("encoder.layers.0.mlp.fc1.weight", (f"{tower}_model.", "", f"clip.{tower}_model."))
        elif model_type == kind:
            nested = config.get(f"{tower}_config")
            section = nested if isinstance(nested, Mapping) else {}
            prefix = f"{tower}_model."
            if f"{prefix}encoder.layers.0.mlp.fc1.weight" not in names:
                continue  # an image classifier on top of the vision tower holds no text tower
        else:
            continue
        default_heads, default_hidden, default_activation = _TOWER_DEFAULTS[kind][tower]
        heads, size = _heads(section, default_heads, default_hidden)
        layers = int(setting(section, "num_hidden_layers", default=12))
        activation = str(setting(section, "hidden_act", default=default_activation))
        own = _tower(names, prefix, layers, heads, size, activation)
        blocks.extend(own)
        projection = f"{'visual' if tower == 'vision' else 'text'}_projection.weight"
        # A tower on its own is made to have its layers read (diffusion, vision-language models); SigLIP gives its
        # vectors away as they are.
        is_exposed = model_type != "clip" or projection not in names
        streams.append(_tower_stream(names, prefix, tower, own, layers, heads * size, projection, is_exposed))
        if is_exposed:
            missing[f"{tower}.residual"] = EXPOSED
        pooling = f"{prefix}head"
        if f"{pooling}.attention.in_proj_weight" in names:
            blocks.extend(_pooling_head(names, pooling, heads, size, activation))
    untouched = (
        HEADS_ON_TOP,
        _EMBEDDINGS,
        _NORMS,
        r"logit_(scale|bias)",
        r"(text|visual)_projection\.weight",
        r".*\bhead\.(probe|weight|bias)",
    )
    aside = (r"logit_(scale|bias)",)
    return with_residuals(names, model_type, blocks, untouched, streams, aside=aside, missing=missing)


def _tower_stream(
    names: Names,
    prefix: str,
    tower: str,
    blocks: list[Attention | FeedForward],
    layers: int,
    size: int,
    projection: str,
    is_exposed: bool,
) -> Residual:
    """The stream of one CLIP tower, from its embeddings to its projection."""
    embeddings = f"{prefix}embeddings"
    has_first = f"{prefix}pre_layrnorm.weight" in names  # SigLIP has none
    norms: list[Norm] = [norm(names, f"{prefix}pre_layrnorm")] if has_first else []
    for index in range(layers):
        layer = f"{prefix}encoder.layers.{index}"
        norms.append(norm(names, f"{layer}.layer_norm1", readers_in(blocks, [f"{layer}.self_attn"])))
        norms.append(norm(names, f"{layer}.layer_norm2", readers_in(blocks, [f"{layer}.mlp"])))
    final = f"{prefix}post_layernorm" if tower == "vision" else f"{prefix}final_layer_norm"
    norms.append(norm(names, final, () if is_exposed else reads(names, projection)))
    first = (
        linear(names, f"{embeddings}.patch_embedding")
        if tower == "vision"
        else writes(names, f"{embeddings}.token_embedding.weight")
    )
    kind, positions = f"{embeddings}.class_embedding", f"{embeddings}.position_embedding.weight"
    places = writes(names, kind, positions)
    start = int(kind in names)
    of_patches = Rows(f"{embeddings}.patch_embedding.bias"), Rows(positions, first=start)
    of_tokens = Rows(f"{embeddings}.token_embedding.weight"), Rows(positions)
    of_kind = Rows(kind), Rows(positions, last=1)
    return residual(
        names,
        f"{tower}.residual",
        size,
        "layer",
        embeddings=first,
        blocks=blocks,
        norms=norms,
        others=places,
        is_exposed=is_exposed,
        sums=[of_patches, of_kind] if tower == "vision" else [of_tokens],
    )


def _pooling_head(names: Names, module: str, heads: int, size: int, activation: str) -> list[Attention | FeedForward]:
    fused, bias = f"{module}.attention.in_proj_weight", names.optional(f"{module}.attention.in_proj_bias")
    query, key, value = (Heads(fused, bias, 0, part * heads * size, size) for part in range(3))
    attention = Attention(
        name=f"{module}.attention",
        groups=heads,
        members=1,
        parts=score_parts(query, key, size),
        value=value,
        output=columns(f"{module}.attention.out_proj", size),
        value_size=size,
        position="none",
    )
    return [attention, plain(names, f"{module}.mlp", f"{module}.mlp.fc1", f"{module}.mlp.fc2", activation)]
