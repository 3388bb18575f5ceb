"""Random masks that depend on nothing but a seed, the expert and the tensor.

A mask is an operand whose blocks are computed instead of read: 1 where a weight is kept, 0 where it is dropped. The
n-th weight of a tensor gets the n-th 32-bit draw of a counter-based generator (Philox 4x64-10, Salmon et al. 2011)
whose key is derived from the seed and the labels of expert and tensor. Any block can be drawn without the ones before
it, so masks depend neither on block sizes, threads and shards nor on the order of tensors, and a second pass over a
tensor sees the same mask.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unmergeable.merges.blocks import Operand, Scratch, accumulation_dtype, widened_blocks
from unmergeable.randomness import Stream

DRAW_BITS = 32
SMALLEST_SUM = 1e-7
"""An L1 norm below it is not restored, as in mergekit."""

_DRAWS_PER_COUNT = 8  # one step of the counter gives four words of 64 bits


def mask_stream(seed: int, expert: int, tensor: str) -> Stream:
    """Where the mask of expert number ``expert`` (from 1) in tensor ``tensor`` is drawn from."""
    return Stream.from_seed(seed).child(f"expert {expert}").child(tensor)


def draws(stream: Stream, start: int, count: int) -> Tensor:
    """Draws ``start`` to ``start + count`` of the stream: uniform int32."""
    key = np.frombuffer(stream.key[:16], dtype="<u8")
    counter, skipped = divmod(start, _DRAWS_PER_COUNT)
    words = np.random.Philox(counter=counter, key=key).random_raw(-(-(skipped + count) // 2))
    return torch.from_numpy(words.astype("<u8", copy=False).view("<i4")[skipped : skipped + count])


def mask_of(like: Operand, read: Callable[[int], Iterator[Tensor]]) -> Operand:
    """The mask of an expert's tensor, whose blocks ``read`` computes."""
    return replace(like, label=f"mask of {like.label}", dtype=accumulation_dtype(like.dtype), read=read)


def bernoulli_mask(stream: Stream, density: float, like: Operand) -> Operand:
    """1 with probability ``density``, exact to 2^-32, independently for each weight of ``like``."""
    return mask_of(like, partial(_bernoulli_blocks, stream, density, like))


def _bernoulli_blocks(stream: Stream, density: float, like: Operand, size: int) -> Iterator[Tensor]:
    # The draws are signed: the smallest is -2^31.
    cut = round(density * 2**DRAW_BITS) - 2 ** (DRAW_BITS - 1)
    buffer = torch.empty(min(size, like.numel), dtype=accumulation_dtype(like.dtype))
    for start in range(0, like.numel, size):
        block = buffer[: min(size, like.numel - start)]
        if density == 1:
            block.fill_(1)
        else:
            torch.lt(draws(stream, start, len(block)), cut, out=block)
        yield block.to(like.device)


def remembered(mask: Operand) -> Operand:
    """The same mask of zeros and ones, drawn once: later passes read it from one bit per weight."""
    bits: list[npt.NDArray[np.uint8]] = []

    def read(size: int) -> Iterator[Tensor]:
        if not bits:
            for block in mask.read(size):
                bits.append(np.packbits(block.cpu().numpy() != 0))
                yield block
            return
        start = 0
        for packed in bits:
            length = min(size, mask.numel - start)
            assert len(packed) == -(-length // 8), "every pass reads in blocks of one size"
            block = torch.from_numpy(np.unpackbits(packed, count=length))
            yield block.to(device=mask.device, dtype=mask.dtype)
            start += length

    return replace(mask, read=read)


def l1_ratios(operands: Sequence[Operand], masks: Sequence[Operand], scratch: Scratch) -> tuple[float, ...]:
    """Per expert ``sum |tau| / sum |mask tau|``: what gives a thinned task vector the L1 norm it had.

    1 where one of the sums is below ``SMALLEST_SUM``.
    """
    before, after = [0.0] * len(masks), [0.0] * len(masks)
    for (base, *blocks), _ in widened_blocks((*operands, *masks), scratch):
        for number, (task_vector, mask) in enumerate(zip(blocks[: len(masks)], blocks[len(masks) :], strict=True)):
            # torch sums in a cascade: as exactly as the numbers are.
            before[number] += float(task_vector.sub_(base).abs_().sum())
            after[number] += float(task_vector.mul_(mask).sum())
    return tuple(
        whole / kept if min(whole, kept) >= SMALLEST_SUM else 1.0 for whole, kept in zip(before, after, strict=True)
    )
