"""A config of the same kind with small sizes: the same flags, layer types and shape of attention, few of everything.

What is a size is told by the name of the setting. Settings with one entry for each layer are cut to the layers that
differ; nested configs are shrunken with the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from unmergeable.architecture.parts import is_of_a_tower

MOST_LAYERS = 4


@dataclass(frozen=True)
class Sizes:
    """How large a small network is. ``heads`` / ``groups`` query heads share a key head.

    ``narrower``: by how much the widths of a network in stages are divided.
    """

    heads: int = 4
    groups: int = 2
    head_size: int = 16
    intermediate: int = 80
    experts: int = 4
    latent: int = 20
    plain: int = 10
    vocabulary: int = 160
    narrower: int = 4

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size

    @property
    def tower(self) -> Sizes:
        """Sizes for what reads images or sound: as wide, with other heads, so that no formula is taken from text."""
        return replace(self, heads=self.heads // 2, groups=self.heads // 2, head_size=2 * self.head_size)


SMALL = Sizes()
WIDE = Sizes(heads=16, groups=4, head_size=24, intermediate=144, experts=8, latent=28, plain=6, narrower=2)
"""What to try instead of the second set, where a class wants heads in fours or positions on a quarter of each."""

UNSEEN = Sizes(heads=8, groups=4, head_size=16, intermediate=96, experts=4, latent=24, plain=14, narrower=2)
"""Sizes that a map is read back for, after it was made from the others."""

OTHER = Sizes(heads=12, groups=4, head_size=8, intermediate=112, experts=8, latent=28, plain=7, narrower=8)
"""A second set, with more query heads for each key head: it tells which setting a number in a map comes from."""

PARTIAL = Sizes(heads=12, groups=4, head_size=20, intermediate=112, experts=8, latent=28, plain=7, narrower=3)
"""What to try after these, where positions turn a share of each head that is no whole number of pairs in the others."""

_HIDDEN = (
    "hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "dim", "emb_dim", "word_embed_proj_dim",
    "embedding_size", "decoder_hidden_size", "encoder_hidden_size", "n_embed", "proj_size", "hidden_size_per_layer",
    "model_dim", "attention_hidden_size", "lru_width", "output_dim", "out_hidden_size", "cross_attention_dim",
    "text_hidden_size", "attention_dim", "rnn_hidden_size", "decoder_dim", "encoder_embed_dim", "mm_hidden_size",
    "intra_bottleneck_size", "true_hidden_size", "cross_hidden_size", "projection_dim",
    "vision_output_dim", "projector_input_dim", "projector_output_dim", "d_latents",
)  # fmt: skip
_INTERMEDIATE = (
    "intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size",
    "moe_intermediate_size", "shared_expert_intermediate_size", "dim_feedforward", "mlp_dim", "ff_dim", "dff",
    "dim_ff", "d_inner",
    "moe_shared_expert_intermediate_size", "intermediate_size_mlp", "feed_forward_size", "encoder_intermediate_size",
    "decoder_intermediate_size", "shared_intermediate_size", "block_ff_dim", "expert_intermediate_size",
    "mlp_hidden_size",
    "dense_intermediate_size", "moe_ffn_hidden_size", "intermediate_size_dense", "expert_ffn_hidden_size",
)  # fmt: skip
_HEADS = (
    "num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
    "num_encoder_attention_heads", "num_decoder_attention_heads", "attention_heads", "num_self_attention_heads",
    "encoder_num_attention_heads", "decoder_num_attention_heads", "num_swa_attention_heads",
    "cross_num_attention_heads", "swa_num_attention_heads", "num_cross_attention_heads",
)  # fmt: skip
_GROUPS = (
    "num_key_value_heads", "num_kv_heads", "n_head_kv", "encoder_num_key_value_heads", "decoder_num_key_value_heads",
    "num_global_key_value_heads", "kv_n_heads", "num_query_groups", "swa_num_key_value_heads", "multi_query_group_num",
    "cross_num_key_value_heads",
)  # fmt: skip
_HEAD_SIZE = (
    "head_dim",
    "d_kv",
    "attention_head_dim",
    "kv_channels",
    "d_head",
    "attention_head_size",
    "global_head_dim",
    "cross_head_dim",
    "swa_head_dim",
)
COUNTS_OF_HEADS = {*_HEADS, *_GROUPS}
SIZES_OF_ONE_HEAD = set(_HEAD_SIZE)
SIZES_OF_HEADS = {*COUNTS_OF_HEADS, *_HEAD_SIZE, *_HIDDEN}
"""Settings by name that say how many heads there are, and how many or how large."""

_LAYERS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers", "depth", "num_blocks",
    "num_hidden_groups",
)  # fmt: skip
_INDICES = {
    "fullatt_block_indexes", "deepstack_visual_indexes", "cross_attention_layers", "intermediate_layers_indices",
}  # fmt: skip
"""Settings that list the layers of one kind."""

_COEFFICIENTS = ("width_coefficient", "depth_coefficient", "depth_multiplier", "width_multiplier")
"""Settings that all widths or depths of a network are multiplied with."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def shrunken(config: Mapping[str, Any], sizes: Sizes = SMALL) -> dict[str, Any]:
    """``config`` (as transformers' ``to_dict`` gives it) with every size replaced by a small one."""
    if any(isinstance(config.get(name), (list, tuple)) for name in _DEPTHS):
        return _with_stages(config, sizes)
    if "neck_hidden_sizes" in config or any(name in config for name in _COEFFICIENTS):
        return _with_few_channels(config, sizes)
    layers = next((int(config[key]) for key in _LAYERS if isinstance(config.get(key), int)), 0)
    kept = _layers_that_differ(config, layers)
    if config.get("num_kv_shared_layers") and layers > MOST_LAYERS:
        kept += _first_of_each_kind(config, layers - int(config["num_kv_shared_layers"]), layers)
    small: dict[str, Any] = {}
    for key, value in config.items():
        if key in _NAMES_OF_LAYERS:
            continue
        if isinstance(value, Mapping) and "model_type" in value:
            small[key] = shrunken(value, sizes.tower if is_of_a_tower(key) and "text_config" in config else sizes)
        elif key in _INDICES and isinstance(value, (list, tuple)) and layers > 1:
            small[key] = [place for place, index in enumerate(kept) if index in value]
        elif isinstance(value, Mapping) and value and all(str(name).isdigit() for name in value):
            part_of = {kept.index(int(name)): part for name, part in value.items() if int(name) in kept}
            small[key] = {
                index: {name: _small(name, one, {**config, **part}, sizes, len(kept)) for name, one in part.items()}
                if isinstance(part, Mapping)
                else part
                for index, part in part_of.items()
            } or dict(value)
        elif isinstance(value, (list, tuple)) and layers > 1 and len(value) == layers:
            per_layer = [value[index] for index in kept]
            is_size = key in _INTERMEDIATE  # there may be one for each layer
            small[key] = [_small(key, one, config, sizes, len(kept)) for one in per_layer] if is_size else per_layer
        elif key.endswith("token_id") or key.endswith("token_index"):
            small[key] = value  # placed below, when all are known
        else:
            small[key] = _small(key, value, config, sizes, len(kept))
    if "intermediate_layers_indices" in small:  # the tower gives these out beside its last layer
        small["vision_output_dim"] = sizes.hidden * (1 + len(small["intermediate_layers_indices"]))
    if "pixel_shuffle_ratio" in small:  # as many patches as become one are read side by side
        small["intermediate_size"] = int(sizes.hidden / small["pixel_shuffle_ratio"] ** 2)
    _place_tokens(small)
    _share_last(small)
    _round_rotary(small, sizes)
    return small


def _share_last(small: dict[str, Any]) -> None:
    """As many of the last layers as may use the keys and values of earlier ones, where the config lets some.

    Every kind of layer among them is also among those before.
    """
    kinds, shared = small.get("layer_types"), small.get("num_kv_shared_layers")
    if shared and kinds:
        first = next(count for count in range(1, len(kinds) + 1) if set(kinds[:count]) == set(kinds))
        small["num_kv_shared_layers"] = min(shared, len(kinds) - first, len(set(kinds)))


def _round_rotary(small: dict[str, Any], sizes: Sizes) -> None:
    """A share of each head that is rotated comes out as whole pairs."""
    if "qk_rope_head_dim" in small:
        return
    rope = small.get("rope_parameters")
    every = [rope, *rope.values()] if isinstance(rope, dict) else []
    for part in (small, *(part for part in every if isinstance(part, dict))):
        share, size = part.get("partial_rotary_factor"), small.get("head_dim") or sizes.head_size
        if isinstance(share, float) and int(size * share) % 2:
            part["partial_rotary_factor"] = max(2, round(size * share / 2) * 2) / size


_DEPTHS = ("depths", "depth")
"""Settings that list how many layers each stage has."""

_NAMES_OF_LAYERS = {"stage_names", "out_features", "out_indices", "_out_features", "_out_indices", "hybrid_layer_ids"}

_PER_STAGE = (
    "embed_dim", "embed_dims", "hidden_size", "hidden_sizes", "dims", "num_groups", "groups_width", "stem_out_channels",
    "stage_in_channels", "stage_mid_channels", "stage_out_channels",
)  # fmt: skip


def _with_stages(config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """A vision network in stages of growing width: fewer layers in each, every width by the same factor smaller."""
    factor = sizes.narrower
    small = {key: value for key, value in config.items() if key not in _NAMES_OF_LAYERS}
    for key in _PER_STAGE:
        value = small.get(key)
        if isinstance(value, (list, tuple)):
            small[key] = [width // factor for width in value]
        elif isinstance(value, int):
            small[key] = value // factor
    if isinstance(small.get("window_size"), int):
        small["window_size"] = 2  # the last stage is 2 by 2
    if "stage_in_channels" in small and isinstance(stem := small.get("stem_channels"), (list, tuple)):
        small["stem_channels"] = [*stem[:-1], small["stage_in_channels"][0]]
    depths = {name: small[name] for name in _DEPTHS if isinstance(small.get(name), (list, tuple))}
    # CvT looks up how often its layers are dropped by the number of their stage, so that each has as many as stages.
    most = {"depths": 2, "depth": len(depths.get("depth", ()))}
    return small | {
        **{name: [min(depth, most[name]) for depth in value] for name, value in depths.items()},
        "image_size": [64, 64] if isinstance(config.get("image_size"), (list, tuple)) else 64,
    }


def _with_few_channels(config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """A network of convolutions whose layers are not counted by a setting: every width smaller, by one factor."""
    factor = sizes.narrower
    small = {key: value for key, value in config.items() if key not in _NAMES_OF_LAYERS}
    for key in _COEFFICIENTS:
        if isinstance(value := config.get(key), float):
            small[key] = min(value, 1 / factor)
    if isinstance(width := config.get("width_coefficient"), float):  # the last width is given as a number, too
        small["hidden_dim"] = round(config["hidden_dim"] * small["width_coefficient"] / width)
    for key in ("hidden_sizes", "neck_hidden_sizes"):
        if isinstance(value := config.get(key), (list, tuple)):
            small[key] = [width // factor for width in value]
            if "num_attention_heads" in config and key == "hidden_sizes":
                counts = (count for count in (sizes.heads, 4, 3, 2, 1) if not any(wide % count for wide in small[key]))
                small["num_attention_heads"] = next(counts)
    if isinstance(value := config.get("n_attn_blocks"), (list, tuple)):
        small["n_attn_blocks"] = [min(count, 2) for count in value]
    return small | {"image_size": 128}  # of a smaller one, the last attention would see one token


def _layers_that_differ(config: Mapping[str, Any], layers: int) -> list[int]:
    """Indices of the layers to keep: the first of every kind, and at least two in all."""
    per_layer = [
        value for value in config.values() if isinstance(value, (list, tuple)) and layers > 1 and len(value) == layers
    ]
    chosen = [value for key, value in config.items() if key in _INDICES and isinstance(value, (list, tuple))]
    first: dict[str, int] = {}
    for index in range(layers):
        own = [value[index] for value in per_layer] + [index in value for value in chosen]
        first.setdefault(repr(own), index)
    kept = sorted(first.values())[:MOST_LAYERS]
    return sorted({*kept, *range(layers)[: max(0, 2 - len(kept)) + (1 if kept == [0] else 0)]})[:MOST_LAYERS] or [0, 1]


def _first_of_each_kind(config: Mapping[str, Any], start: int, stop: int) -> list[int]:
    """Among layers ``start`` to ``stop``, the first of every kind."""
    kinds = config.get("layer_types") or [""] * stop
    return sorted({kinds[index]: index for index in range(stop - 1, start - 1, -1)}.values())


def _small(key: str, value: Any, config: Mapping[str, Any], sizes: Sizes, layers: int) -> Any:
    """The small value of one setting; the value itself where it is no size."""
    if key == "attn_layer_indices" and value is None:
        return [1]
    if key.endswith("swiglu_limit") and isinstance(value, float):
        return min(value, 0.5)  # or nothing in a small network would reach it
    if isinstance(value, bool) or value is None:
        return value
    if key in _COEFFICIENTS and isinstance(value, float):
        return min(value, 1 / sizes.narrower)
    if key == "block_types" and isinstance(value, (list, tuple)):
        return list(value)[::-1]  # attention comes last, and few layers are kept
    if isinstance(value, Mapping):
        return _small_rope(value, config, sizes) if "rope_theta" in value else dict(value)
    if key == "mrope_section":
        return _sections(value, sizes)
    if key in {"axes_dims_rope", "axes_dim_rope", "rope_axes_dim"}:
        third = sizes.head_size // 6 * 2
        return [sizes.head_size - 2 * third, third, third]
    if key == "vision_feature_layer" and isinstance(value, (list, tuple)):
        return [-1 - place % 3 for place in range(len(value))]
    if key == "projector_patch_to_query_dict":
        return {16: 4}
    if key in {"attention_window", "block_sizes"} and isinstance(value, (list, tuple)):
        return [4 if key == "attention_window" else 1] * len(value)
    if key in {"image_size", "patch_size"} and isinstance(value, (list, tuple)):
        return [_OTHER[key](side, sizes) for side in value]
    if key == "image_grid_pinpoints" and isinstance(value, (list, tuple)):
        return [[32, 64], [64, 32], [64, 64]]
    if not isinstance(value, int):
        return value
    if key == "patch_size" and "_class_name" in config:
        return min(value, 2)  # a network of latents, which are few: one token would attend to itself
    if key == "attention_hidden_size" and value == 2 * int(config.get("hidden_size") or 0):
        return 2 * sizes.hidden
    if key in _HIDDEN:
        return sizes.hidden
    if key in _INTERMEDIATE:
        return sizes.intermediate
    if key in _HEADS:
        return sizes.heads
    if key in _GROUPS:
        if "kv_lora_rank" in config:  # latent attention has a key for every head
            return sizes.heads
        return 1 if value == 1 else sizes.groups
    if key in _HEAD_SIZE:
        if key == "head_dim" and "qk_rope_head_dim" in config:
            # With latent attention this name is that of the rotary part, or of both.
            is_both = value >= int(config["qk_rope_head_dim"]) + int(config.get("qk_nope_head_dim") or value)
            return sizes.head_size // 2 + (sizes.plain if is_both else 0)
        return sizes.head_size
    if key in _LAYERS:
        return min(value, layers)
    if key in _EXPERTS:
        return sizes.experts
    return _OTHER[key](value, sizes) if key in _OTHER else value


def _small_rope(rope: Mapping[str, Any], config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    small = {**rope, "rope_theta": rope["rope_theta"] or 10000.0}
    if "partial_rotary_factor" in rope and "qk_rope_head_dim" in config and "qk_nope_head_dim" in config:
        rotary, plain = (_OTHER[f"qk_{part}_head_dim"](0, sizes) for part in ("rope", "nope"))
        small["partial_rotary_factor"] = 1.0 if "head_dim" in config else rotary / (rotary + plain)
    return small | {"mrope_section": _sections(rope["mrope_section"], sizes)} if "mrope_section" in rope else small


def _sections(sections: Any, sizes: Sizes) -> list[int]:
    """Rotary pairs for time, height and width in about the same shares."""
    whole, pairs = sum(sections), sizes.head_size // 2
    if whole <= pairs:
        return list(sections)
    small = [max(1, part * pairs // whole) for part in sections]
    if len(sections) == 3 and sections[0] == sections[1]:
        return [*small[:2], pairs - sum(small[:2])]
    return [pairs - sum(small[1:]), *small[1:]]


def _place_tokens(config: dict[str, Any]) -> None:
    """Special tokens inside the small vocabulary, beside those that inputs are made of."""
    special = [key for key in config if key.endswith(("token_id", "token_index"))]
    for place, key in enumerate(special):
        value = config[key]
        if isinstance(value, int):
            config[key] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(key, 3 + place)
        elif isinstance(value, (list, tuple)) and value:
            config[key] = [2]


def filled(config: Mapping[str, Any], sizes: Sizes = SMALL) -> dict[str, Any]:
    """``config`` with the settings that it leaves open and that some classes do not fill in by themselves."""
    layers = next((int(config[key]) for key in _LAYERS if isinstance(config.get(key), int)), 2)
    unset = {
        **_usual(sizes),
        **dict.fromkeys(("layer_types", "layers_block_type"), ["full_attention"] * layers),
        "mlp_layer_types": ["dense", *["sparse"] * (layers - 1)],
        "sliding_window": 4,
        "deepstack_layer_map": [],
        "downsample_rate": "1/2",
        "vocabulary_map": {"<image>": 5},
        "default_language": next(iter(config.get("languages") or [None])),
        "indexer_n_heads": sizes.groups,
        "indexer_kv_heads": 1,
        "indexer_head_dim": sizes.head_size,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        **dict.fromkeys(("image_token_id", "image_token_index", "pad_token_id"), 5),
    }
    full: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and "model_type" in value:
            full[key] = filled(value, sizes)
        elif key == "rope_parameters" and isinstance(value, Mapping):
            full[key] = _filled_rope(value, sizes)
        elif key in {"layer_types", "layers_block_type"} and value and set(value) == {"linear_attention"}:
            full[key] = [("linear_attention", "full_attention")[place % 2] for place in range(len(value))]
        else:
            full[key] = unset[key] if value is None and key in unset else value
    return full


def _filled_rope(rope: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Rotary settings with those for time, height and width, or for the one kind of layers, where there are none."""
    if not rope:
        return {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    if "mrope_section" in rope or "rope_theta" not in rope:
        return dict(rope)
    pairs = int(sizes.head_size * (rope.get("partial_rotary_factor") or 1)) // 2
    third = pairs // 3
    return {**rope, "mrope_section": [pairs - 2 * third, third, third]}


def supply(small: dict[str, Any], error: BaseException | None, sizes: Sizes) -> bool:
    """Put a setting into a small config that ``error`` says is missing from it, or from a part; False if unknown."""
    usual = _usual(sizes)
    if not isinstance(error, AttributeError) or error.name not in usual:
        return False
    kind = getattr(error.obj, "model_type", None)
    for part in (small, *(value for value in small.values() if isinstance(value, dict))):
        if part.get("model_type") == kind and error.name not in part:
            part[error.name] = usual[error.name]
            return True
    return False


def _usual(sizes: Sizes) -> dict[str, Any]:
    """Small values of settings that a config may leave open."""
    return {
        "head_dim": sizes.head_size,
        **dict.fromkeys(_GROUPS, sizes.groups),
        **dict.fromkeys(_INTERMEDIATE, sizes.intermediate),
        **dict.fromkeys(_EXPERTS, sizes.experts),
        **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
        "n_shared_experts": 1,
        "rope_theta": 10000.0,
        "vocab_size": sizes.vocabulary,
    }


_OTHER: dict[str, Callable[[int, Sizes], int]] = {
    "vocab_size": lambda value, sizes: sizes.vocabulary,
    "vocab_size_per_layer_input": lambda value, sizes: sizes.vocabulary,
    "max_position_embeddings": lambda value, sizes: 128,
    "n_positions": lambda value, sizes: 128,
    "num_experts_per_tok": lambda value, sizes: min(value, 2),
    "num_experts_per_token": lambda value, sizes: min(value, 2),
    "moe_topk": lambda value, sizes: min(value, 2),
    "moe_k": lambda value, sizes: min(value, 2),
    "top_k_experts": lambda value, sizes: min(value, 2),
    "n_group": lambda value, sizes: min(value, 2),
    "num_expert_group": lambda value, sizes: min(value, 2),
    "encoder_hash_byte_group_vocab": lambda value, sizes: 64,
    "topk_group": lambda value, sizes: 1,
    "n_shared_experts": lambda value, sizes: min(value, 1),
    "first_k_dense_replace": lambda value, sizes: min(value, 1),
    "num_dense_layers": lambda value, sizes: min(value, 1),
    "kv_lora_rank": lambda value, sizes: sizes.latent,
    "q_lora_rank": lambda value, sizes: sizes.latent + 4,
    "qk_nope_head_dim": lambda value, sizes: sizes.plain,
    "qk_rope_head_dim": lambda value, sizes: sizes.head_size // 2,
    "qk_head_dim": lambda value, sizes: sizes.plain + sizes.head_size // 2,
    "v_head_dim": lambda value, sizes: sizes.plain + 2,
    "rotary_dim": lambda value, sizes: sizes.head_size // 2,
    "num_self_attends_per_block": lambda value, sizes: min(value, 2),
    "num_latents": lambda value, sizes: min(value, 12),
    "num_layers_per_stack": lambda value, sizes: min(value, 2),
    **dict.fromkeys(("hc_lowrank", "laurel_rank"), lambda value, sizes: sizes.latent),
    "image_size": lambda value, sizes: 32,
    **dict.fromkeys(("window_size",), lambda value, sizes: min(value, 16)),
    **dict.fromkeys(("mm_tokens_per_image", "image_seq_length", "num_image_tokens"), lambda value, sizes: 4),
    "num_global_layers": lambda value, sizes: min(value, 2),
    "patch_size": lambda value, sizes: 8,
    **dict.fromkeys(
        ("caption_channels", "joint_attention_dim", "text_dim", "text_embed_dim", "cap_feat_dim"),
        lambda value, sizes: sizes.latent,
    ),
    "caption_projection_dim": lambda value, sizes: sizes.hidden,
    "pooled_projection_dim": lambda value, sizes: sizes.plain,
    **dict.fromkeys(("time_embed_dim", "freq_dim"), lambda value, sizes: 32),
    **dict.fromkeys(("num_single_layers", "num_mmdit_layers", "num_single_dit_layers"), lambda value, sizes: 2),
    **dict.fromkeys(("sample_size", "sample_height", "sample_width"), lambda value, sizes: min(value, 8)),
    "sample_frames": lambda value, sizes: 9 if value % 2 else 2,
    "max_text_seq_length": lambda value, sizes: 6,
    "latent_query_num": lambda value, sizes: 4,
    "share_expert_dim": lambda value, sizes: sizes.intermediate,
    "upsample_groups": lambda value, sizes: sizes.hidden,
    "input_feat_per_channel": lambda value, sizes: 16,
    "conv_channels": lambda value, sizes: sizes.hidden,
    "sliding_window": lambda value, sizes: 4,
    "num_mel_bins": lambda value, sizes: 16,
    "max_source_positions": lambda value, sizes: 32,
    "max_target_positions": lambda value, sizes: 64,
    "linear_num_heads": lambda value, sizes: min(value, sizes.groups),
    "linear_head_dim": lambda value, sizes: 8,
    "linear_num_key_heads": lambda value, sizes: 2,
    "linear_num_value_heads": lambda value, sizes: min(value, 4),
    "linear_key_head_dim": lambda value, sizes: 8,
    "linear_value_head_dim": lambda value, sizes: 8,
    "unpadded_vocab_size": lambda value, sizes: sizes.vocabulary,
    "attn_layer_period": lambda value, sizes: min(value, 2),
    "attn_layer_offset": lambda value, sizes: min(value, 1),
    "mamba_n_heads": lambda value, sizes: 2 * sizes.heads,
    "n_mamba_heads": lambda value, sizes: 2 * sizes.heads,
    "mamba_headdim": lambda value, sizes: sizes.head_size,
    "mamba_d_head": lambda value, sizes: sizes.head_size,
    "mamba_d_ssm": lambda value, sizes: 2 * sizes.heads * sizes.head_size,
    "num_group": lambda value, sizes: min(value, 2),
    "dim_model": lambda value, sizes: sizes.hidden,
    "mamba_d_state": lambda value, sizes: 8,
    "hidden_size_per_layer_input": lambda value, sizes: 12,
}
