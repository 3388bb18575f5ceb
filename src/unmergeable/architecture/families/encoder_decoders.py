"""T5 and Flan-T5: relative position biases shared by the layers of a stack, cross-attention, no biases."""

from __future__ import annotations

from unmergeable.architecture.blocks import Architecture, Attention, FeedForward, SharedHeads
from unmergeable.architecture.declare import Config, Names, gated, plain, separate_attention, setting
from unmergeable.errors import UnsupportedArchitecture


def t5(config: Config, names: Names) -> Architecture:
    """T5 (ReLU) and T5 1.1 / Flan-T5 (gated GELU)."""
    heads, size = int(setting(config, "num_heads", default=8)), int(setting(config, "d_kv", default=64))
    layers = int(setting(config, "num_layers", default=6))
    feed_forward = str(setting(config, "feed_forward_proj", default="relu"))
    depth = {"encoder": layers, "decoder": int(setting(config, "num_decoder_layers", default=layers))}
    blocks: list[Attention | FeedForward] = []
    shared: list[SharedHeads] = []
    for stack in ("encoder", "decoder"):
        if f"{stack}.block.0.layer.0.SelfAttention.q.weight" not in names:
            if stack == "encoder":
                raise UnsupportedArchitecture("tensor encoder.block.0.layer.0.SelfAttention.q.weight is missing.")
            continue  # an encoder-only checkpoint
        members: list[str] = []
        for index in range(depth[stack]):
            layer = f"{stack}.block.{index}.layer"
            attention = separate_attention(
                names,
                f"{layer}.0.SelfAttention",
                ("q", "k", "v", "o"),
                groups=heads,
                size=size,
                position="relative_bias",
            )
            blocks.append(attention)
            members.append(attention.name)
            last = 1
            if stack == "decoder":
                blocks.append(
                    separate_attention(
                        names,
                        f"{layer}.1.EncDecAttention",
                        ("q", "k", "v", "o"),
                        groups=heads,
                        size=size,
                        is_cross=True,
                    )
                )
                last = 2
            module = f"{layer}.{last}.DenseReluDense"
            if feed_forward.startswith("gated"):
                blocks.append(gated(names, module, "wi_0", "wi_1", "wo"))
            else:
                blocks.append(plain(names, module, f"{module}.wi", f"{module}.wo", feed_forward))
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shared.append(SharedHeads(f"{stack}.relative_bias", tuple(members), bias))
    untouched = (
        r"shared\.weight",
        r"lm_head\.weight",
        r"(encoder|decoder)\.embed_tokens\.weight",
        r".*layer_norm\.weight",
        r".*relative_attention_bias\.weight",
        r"(classification_head|classifier|qa_outputs)\..*",
    )
    return Architecture("t5", tuple(blocks), untouched, tuple(shared))
