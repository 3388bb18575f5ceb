"""Encoders without positions inside attention: BERT, RoBERTa, ViT, DINOv2, CLIP, SigLIP."""

from __future__ import annotations

from collections.abc import Mapping

from unmergeable.architecture.blocks import Architecture, Attention, FeedForward, Heads
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
    return Architecture(str(config["model_type"]), tuple(blocks), untouched)


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
    return Architecture("vit", tuple(blocks), (HEADS_ON_TOP, _EMBEDDINGS, _NORMS, r".*\bdecoder\.0\..*"))


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
    return Architecture("dinov2", tuple(blocks), untouched)


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
        blocks.extend(_tower(names, prefix, layers, heads, size, activation))
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
    return Architecture(model_type, tuple(blocks), untouched)


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
