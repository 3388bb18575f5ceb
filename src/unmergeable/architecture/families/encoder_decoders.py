"""T5 and Flan-T5: relative position biases shared by the layers of a stack, cross-attention, no biases."""

from __future__ import annotations

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import Attention, FeedForward, SharedHeads
from unmergeable.architecture.declare import Config, Names, gated, plain, separate_attention, setting
from unmergeable.architecture.residual import Norm
from unmergeable.architecture.streams import (
    EXPOSED,
    cross_readers,
    norm,
    readers_in,
    reads,
    residual,
    with_residuals,
    writes,
)
from unmergeable.errors import UnsupportedArchitecture


def t5(config: Config, names: Names) -> Architecture:
    """T5 (ReLU) and T5 1.1 / Flan-T5 (gated GELU)."""
    heads, size = int(setting(config, "num_heads", default=8)), int(setting(config, "d_kv", default=64))
    layers = int(setting(config, "num_layers", default=6))
    feed_forward = str(setting(config, "feed_forward_proj", default="relu"))
    depth = {"encoder": layers, "decoder": int(setting(config, "num_decoder_layers", default=layers))}
    blocks: list[Attention | FeedForward] = []
    shared: list[SharedHeads] = []
    norms: list[Norm] = []
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
            inside = [f"{layer}.0.SelfAttention"]
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
                inside.append(f"{layer}.1.EncDecAttention")
                last = 2
            module = f"{layer}.{last}.DenseReluDense"
            if feed_forward.startswith("gated"):
                blocks.append(gated(names, module, "wi_0", "wi_1", "wo"))
            else:
                blocks.append(plain(names, module, f"{module}.wi", f"{module}.wo", feed_forward))
            norms += [
                norm(names, f"{layer}.{place}.layer_norm", readers_in(blocks, [reader]))
                for place, reader in enumerate([*inside, module])
            ]
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
    if "decoder.final_layer_norm.weight" not in names:
        return with_residuals(
            names, "t5", blocks, untouched, (), shared_heads=tuple(shared), missing={"residual": EXPOSED}
        )
    # One embedding feeds both stacks, so that they share one stream.
    head = reads(names, "lm_head.weight")
    is_tied = bool(setting(config, "tie_word_embeddings", default=True)) or not head
    norms.append(norm(names, "encoder.final_layer_norm", cross_readers(blocks)))
    norms.append(norm(names, "decoder.final_layer_norm", () if is_tied else head))
    embeddings = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    stream = residual(
        names,
        "residual",
        names.shapes["encoder.final_layer_norm.weight"][0],
        "rms",
        embeddings=writes(names, *embeddings),
        blocks=blocks,
        norms=norms,
        others=[*head, *cross_readers(blocks)],
        tied="shared.weight" if is_tied else None,
    )
    aside = (r"(classification_head|classifier|qa_outputs)\.bias",)
    return with_residuals(names, "t5", blocks, untouched, [stream], shared_heads=tuple(shared), aside=aside)
