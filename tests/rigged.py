"""Exact rewrites that are no change of basis, written out by hand: what a naive audit takes for a perfect protection.

Each takes float64 tensors by name and returns them rewritten, and as a control the same with one half of the rewrite
left out, which is another function. None where the family has no such rewrite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Attention
from unmergeable.architecture.blocks import FeedForward, Heads, output_bias, stream_readers
from unmergeable.architecture.residual import Norm, Residual

State = dict[str, Tensor]
Rigged = tuple[State, State] | None
Rewrite = Callable[[State, Architecture, torch.Generator], Rigged]


def streams(architecture: Architecture) -> tuple[Residual, ...]:
    return (*architecture.residuals, *architecture.exposed)


def norms(architecture: Architecture) -> Iterator[tuple[Residual, Norm, list[tuple[str, int, int, str]]]]:
    """Every norm on a stream with its readers: (weight, axis of its inputs, copies, what its bias is called)."""
    blocks = {block.name: block for block in architecture.blocks}
    for stream in streams(architecture):
        for norm in stream.norms:
            axes = stream_readers(blocks[norm.then]) if norm.then else norm.readers
            yield stream, norm, [(axis.tensor, axis.axis, axis.copies, bias_name(axis.tensor)) for axis in axes]


def bias_name(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def rows(weight: Tensor, axis: int) -> Tensor:
    return weight.movedim(axis, -1)


def places(heads: Heads, groups: int, members: int, size: int) -> list[list[list[int]]]:
    start = heads.offset
    return [
        [[start + g * heads.group_stride + m * heads.member_stride + i for i in range(size)] for m in range(members)]
        for g in range(groups)
    ]


def like(tensor: Tensor, generator: torch.Generator, size: float) -> Tensor:
    return size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)


def copy(tensors: State) -> State:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def value_bias(tensors: State, architecture: Architecture, generator: torch.Generator) -> Rigged:
    """b_v + c, b_o - W_o c; one c for each key-value head, seen by all query heads that share it."""
    changed, half = copy(tensors), copy(tensors)
    for block in architecture.attentions:
        output = output_bias(block)
        if block.value.bias is None or output not in tensors:
            continue
        weight = rows(tensors[block.output.weight], block.output.axis)
        inner = places(block.value, block.groups, 1, block.value_size)
        outer = places(block.output, block.groups, block.members, block.value_size)
        for group in range(block.groups):
            c = 3 * torch.randn(block.value_size, generator=generator, dtype=torch.float64)
            for state in (changed, half):
                state[block.value.bias][inner[group][0]] += c
            for member in range(block.members):
                changed[output] -= weight[:, outer[group][member]] @ c
    return differing(changed, half, tensors)


def key_bias(tensors: State, architecture: Architecture, generator: torch.Generator) -> Rigged:
    """Any bias of keys, where positions do not turn them; the control gives it to the queries."""
    changed, half = copy(tensors), copy(tensors)
    for block in architecture.attentions:
        for part in block.parts if block.norm is None else ():
            if part.rotary is None and part.key.bias is not None and part.query.bias is not None:
                for group in range(block.groups):
                    c = 3 * torch.randn(part.size, generator=generator, dtype=torch.float64)
                    changed[part.key.bias][places(part.key, block.groups, 1, part.size)[group][0]] += c
                    half[part.query.bias][places(part.query, block.groups, 1, part.size)[group][0]] += c
    return differing(changed, half, tensors)


def norm_bias(tensors: State, architecture: Architecture, generator: torch.Generator) -> Rigged:
    """b + c, every reader's bias - W c; behind a block, the bias of what its reader adds - c as well."""
    changed, half = copy(tensors), copy(tensors)
    blocks = {block.name: block for block in architecture.blocks}
    for _, norm, readers in norms(architecture):
        names = [bias for *_, bias in readers] + ([output_bias(blocks[norm.then])] if norm.then else [])
        if norm.bias is None or not readers or not all(name in tensors for name in names):
            continue
        c = like(tensors[norm.bias], generator, 2.0)
        for state in (changed, half):
            state[norm.bias] += c
        for weight, axis, copies, bias in readers:
            changed[bias] -= rows(tensors[weight], axis)[..., : copies * len(c)] @ c.repeat(copies)
        if norm.then:
            changed[names[-1]] -= c
    return differing(changed, half, tensors)


def norm_gain(tensors: State, architecture: Architecture, generator: torch.Generator) -> Rigged:
    """g s, every reader's columns / s; b s too."""
    changed, half = copy(tensors), copy(tensors)
    for _, norm, readers in norms(architecture):
        if norm.then or not readers:
            continue
        s = (torch.rand(len(tensors[norm.gain]), generator=generator, dtype=torch.float64) - 0.5).mul(1.2).exp()
        for state in (changed, half):
            state[norm.gain] = (state[norm.gain] + norm.offset) * s - norm.offset
            if norm.bias is not None:
                state[norm.bias] *= s
        for weight, axis, copies, _ in readers:
            rows(changed[weight], axis)[..., : copies * len(s)] /= s.repeat(copies)
    return differing(changed, half, tensors)


def layer_scale(tensors: State, architecture: Architecture, generator: torch.Generator) -> Rigged:
    """l s, the writer's rows and bias / s, with signs."""
    changed, half = copy(tensors), copy(tensors)
    blocks = {block.name: block for block in architecture.blocks}
    for stream in streams(architecture):
        for gain, name in stream.layer_scales.items():
            s = torch.randn(len(tensors[gain]), generator=generator, dtype=torch.float64)
            s = s.sign() * (s.abs() + 0.1)
            down, bias = writer(blocks[name])
            for state in (changed, half):
                state[gain] *= s
            rows(changed[down.weight], 1 - down.axis)[...] /= s
            changed[bias] /= s
    return differing(changed, half, tensors)


def unseen_reading(tensors: State, architecture: Architecture, generator: torch.Generator) -> Rigged:
    """Readers of a LayerNorm + u (1/g)^T, their bias - u sum(b/g)."""
    changed, half = copy(tensors), copy(tensors)
    for stream, norm, readers in norms(architecture):
        biases = [bias for *_, bias in readers]
        if stream.kind != "layer" or not readers or (norm.bias is not None and not all(b in tensors for b in biases)):
            continue
        gain = tensors[norm.gain] + norm.offset
        for weight, axis, copies, bias in readers:
            for part in range(copies):
                columns = rows(changed[weight], axis)[..., part * len(gain) : (part + 1) * len(gain)]
                u = 0.5 * torch.randn(columns.shape[:-1], generator=generator, dtype=torch.float64)
                columns += u[..., None] / gain
                wrong = rows(half[weight], axis)[..., part * len(gain) : (part + 1) * len(gain)]
                wrong += u[..., None] * gain
                if norm.bias is not None:
                    changed[bias] -= u * (tensors[norm.bias] / gain).sum()
    return differing(changed, half, tensors)


def unseen_writing(tensors: State, architecture: Architecture, generator: torch.Generator) -> Rigged:
    """What blocks add to a stream that only LayerNorms read + (1/l) 1 u^T; the control spares one coordinate."""
    changed, half = copy(tensors), copy(tensors)
    blocks = {block.name: block for block in architecture.blocks}
    for stream in streams(architecture):
        behind = [norm.then for norm in stream.norms if norm.then and norm is not stream.norms[-1]]
        seen = {axis.tensor for axis in stream.axes if axis.variance == "covector"}
        seen -= {reader.tensor for norm in stream.norms for reader in norm.readers}
        is_seen = bool(seen) or not any(norm.readers for norm in stream.norms)
        if stream.kind != "layer" or (stream.is_exposed and not stream.is_normed_out and not behind):
            continue
        scales = {name: tensors[gain] for gain, name in stream.layer_scales.items()}
        for name, block in blocks.items():
            down, bias = writer(block)
            is_along = any(axis.tensor == down.weight for axis in stream.axes)
            if not is_along or (is_seen and name not in behind):
                continue
            columns = rows(changed[down.weight], 1 - down.axis)
            v = 0.5 * torch.randn(columns.shape[:-1], generator=generator, dtype=torch.float64)
            added = v[..., None] / scales.get(name, torch.ones(stream.size, dtype=torch.float64))
            columns += added
            added[..., 0] = 0
            rows(half[down.weight], 1 - down.axis)[...] += added
            if bias in tensors:
                changed[bias] += 0.7 / scales.get(name, torch.ones(stream.size, dtype=torch.float64))
    return differing(changed, half, tensors)


def router(tensors: State, architecture: Architecture, generator: torch.Generator) -> Rigged:
    """Every row of a softmax router + c; the control gives it to all rows but one."""
    changed, half = copy(tensors), copy(tensors)
    for mixture in architecture.mixtures:
        if mixture.router_bias is None:
            c = torch.randn(tensors[mixture.router].shape[1], generator=generator, dtype=torch.float64)
            changed[mixture.router] += c
            half[mixture.router][1:] += c
    return differing(changed, half, tensors)


def summed_rows(tensors: State, architecture: Architecture, generator: torch.Generator) -> Rigged:
    """A vector on every row of one table, off every row of another that is always added to it."""
    changed, half = copy(tensors), copy(tensors)

    def exists(name: str) -> bool:
        return name in tensors

    def both(first: str, second: str, *, rows_of_second: slice = slice(None), also: tuple[str, ...] = ()) -> None:
        vector = 2 * torch.randn(tensors[first].shape[-1], generator=generator, dtype=torch.float64)
        for state in (changed, half):
            state[first] += vector
        for name in filter(exists, also):
            changed[name] += vector
        table = changed[second]
        (table[0] if table.dim() == 3 else table)[rows_of_second] -= vector

    for name in tensors:
        stem = name.partition("embeddings.")[0] + "embeddings."
        if name.endswith("embeddings.token_type_embeddings.weight"):
            both(name, f"{stem}position_embeddings.weight")
        if name.endswith("embeddings.token_embedding.weight") or name.endswith("embeddings.class_embedding"):
            first = slice(0, 1) if name.endswith("class_embedding") else slice(None)
            both(name, f"{stem}position_embedding.weight", rows_of_second=first)
        if name.endswith("embeddings.cls_token"):
            both(name, f"{stem}position_embeddings", rows_of_second=slice(0, 1))
            bias = f"{stem}patch_embeddings.projection.bias"
            both(bias, f"{stem}position_embeddings", rows_of_second=slice(1, None), also=(f"{stem}mask_token",))
        if name.endswith("mlp.fc2.bias") and (other := name.replace("mlp.fc2", "self_attn.dense")) in tensors:
            both(name, other)  # Phi, side by side
    if "lm_head.weight" in tensors and "transformer.wpe.weight" in tensors:
        both("transformer.wte.weight", "transformer.wpe.weight")
    return differing(changed, half, tensors)


def position_bias(tensors: State, architecture: Architecture, generator: torch.Generator) -> Rigged:
    """A number per head on all its biases of positions; the control gives it to half of the distances."""
    changed, half = copy(tensors), copy(tensors)
    for name, tensor in tensors.items():
        if name.endswith("relative_attention_bias.weight"):
            numbers = 3 * torch.randn(tensor.shape[1], generator=generator, dtype=torch.float64)
            changed[name] += numbers
            half[name][: len(tensor) // 4] += numbers
    return differing(changed, half, tensors)


def extreme_scales(tensors: State, architecture: Architecture, generator: torch.Generator) -> Rigged:
    """Queries and values x 2^100 against keys and output, where no norm lies between."""
    changed, half = copy(tensors), copy(tensors)
    for block in architecture.attentions:
        pairs = [(block.value, block.output, block.value_size, block.groups, block.members)]
        for heads, other, size, groups, members in pairs:
            for name, axis in ((heads.weight, heads.axis), (heads.bias, 0)):
                if name is not None:
                    for group in places(heads, groups, 1, size):
                        for state in (changed, half):
                            state[name].movedim(axis, 0)[group[0]] *= 2.0**100
            for group in places(other, groups, members, size):
                for member in group:
                    changed[other.weight].movedim(other.axis, 0)[member] /= 2.0**100
        if block.norm is None and not any(part.shared_key for part in block.parts):
            for part in block.parts:
                sides = ((part.query, block.members, 2.0**100), (part.key, 1, 2.0**-100))
                for heads, members, factor in sides:
                    for name, axis in ((heads.weight, heads.axis), (heads.bias, 0)):
                        if name is not None:
                            for group in places(heads, block.groups, members, part.size):
                                for member in group:
                                    changed[name].movedim(axis, 0)[member] *= factor
    return differing(changed, half, tensors)


def writer(block: Attention | FeedForward) -> tuple[Heads, str]:
    return (block.output if isinstance(block, Attention) else block.down), output_bias(block)


def differing(changed: State, half: State, tensors: State) -> Rigged:
    if all(torch.equal(changed[name], tensors[name]) for name in tensors):
        return None
    return changed, half


REWRITES: dict[str, Rewrite] = {
    rewrite.__name__: rewrite
    for rewrite in (
        value_bias, key_bias, norm_bias, norm_gain, layer_scale, unseen_reading, unseen_writing, router, summed_rows,
        position_bias, extreme_scales,
    )
}  # fmt: skip


def everything(tensors: State, architecture: Architecture, generator: torch.Generator) -> State:
    """All rewrites one after another."""
    for rewrite in REWRITES.values():
        rigged = rewrite(tensors, architecture, generator)
        tensors = tensors if rigged is None else rigged[0]
    return tensors
