"""The UNet of Stable Diffusion 1.5 in diffusers: transformer blocks between convolutions.

Each block has self-attention (``attn1``), attention to the text (``attn2``) and a GEGLU feed-forward stored as
[value; gate]. The number of heads is what the config calls ``attention_head_dim``.
"""

from __future__ import annotations

import re

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import Attention, FeedForward
from unmergeable.architecture.declare import Config, Names, separate_attention, setting, unit_columns, units
from unmergeable.architecture.residual import Residual
from unmergeable.architecture.streams import linear, norm, readers_in, reads, residual, with_residuals
from unmergeable.errors import UnsupportedArchitecture

_BLOCK = re.compile(r"((?:down|up)_blocks\.(\d+)|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+")
_TRANSFORMER = re.compile(r"\.transformer_blocks\.\d+$")
_CONVOLUTIONS = (
    r".*\battentions\.\d+\.(norm\.(weight|bias)|proj_out\.bias)|.*\b(resnets|downsamplers|upsamplers)\..*|"
    r"(conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|class_embedding|encoder_hid_proj)\b.*"
)


def unet(config: Config, names: Names) -> Architecture:
    """UNet2DConditionModel with transformer blocks (SD 1.x; SD 2.x differs only in its sizes)."""
    per_block = setting(config, "num_attention_heads", "attention_head_dim", default=8)
    levels = len(setting(config, "block_out_channels"))
    heads_of = list(per_block) if isinstance(per_block, (list, tuple)) else [per_block] * levels
    modules: dict[str, int] = {}
    for name in names.shapes:
        match = _BLOCK.match(name)
        if match is None:
            continue
        level = levels - 1 if match[2] is None else int(match[2])
        modules[match[0]] = int(heads_of[levels - 1 - level if match[0].startswith("up") else level])
    if not modules:
        raise UnsupportedArchitecture("UNet2DConditionModel: this UNet has no attention blocks to work on.")
    blocks: list[Attention | FeedForward] = []
    for module, heads in modules.items():
        for label in ("attn1", "attn2"):
            if f"{module}.{label}.to_q.weight" not in names:
                continue
            size = names.shapes[f"{module}.{label}.to_q.weight"][0] // heads
            projections = ("to_q", "to_k", "to_v", "to_out.0")
            blocks.append(
                separate_attention(
                    names, f"{module}.{label}", projections, groups=heads, size=size, is_cross=label == "attn2"
                )
            )
        inner = f"{module}.ff.net.0.proj"
        width = names.shapes.get(f"{inner}.weight", (0,))[0] // 2
        blocks.append(
            FeedForward(
                name=f"{module}.ff",
                size=width,
                up=units(names, inner),
                gate=units(names, inner, offset=width),
                down=unit_columns(f"{module}.ff.net.2"),
            )
        )
    untouched = (
        r".*\bnorm\d*\.(weight|bias)",
        r".*\b(to_out|net)\.\d\.bias",
        r".*\bproj_(in|out)\.(weight|bias)",
        r".*\b(resnets|downsamplers|upsamplers)\..*",
        r"(conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|class_embedding|encoder_hid_proj)\b.*",
    )
    streams = [
        _stream(names, module, blocks) for module in dict.fromkeys(_TRANSFORMER.sub("", name) for name in modules)
    ]
    return with_residuals(names, "UNet2DConditionModel", blocks, untouched, streams, aside=(_CONVOLUTIONS,))


def _stream(names: Names, module: str, blocks: list[Attention | FeedForward]) -> Residual:
    """The stream of one transformer, between the projections from and to the channels of the convolutions."""
    own = [block for block in blocks if block.name.startswith(f"{module}.")]
    norms = []
    for layer in dict.fromkeys(block.name.rpartition(".")[0] for block in own):
        for place, reader in enumerate(("attn1", "attn2", "ff"), 1):
            if f"{layer}.norm{place}.weight" in names:
                norms.append(norm(names, f"{layer}.norm{place}", readers_in(own, [f"{layer}.{reader}"])))
    return residual(
        names,
        f"{module}.residual",
        names.shapes[f"{module}.proj_in.weight"][0],
        "layer",
        embeddings=linear(names, f"{module}.proj_in"),
        blocks=own,
        norms=norms,
        others=reads(names, f"{module}.proj_out.weight"),
    )
