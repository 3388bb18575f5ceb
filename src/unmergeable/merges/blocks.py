"""One tensor of every model in, one merged tensor out, in blocks that fit the processor's cache.

A merge reads each weight once and does a handful of operations on it, so its cost is memory traffic. The operands
arrive as blocks of ``BLOCK_ELEMENTS`` in their stored dtype, are widened into scratch that is allocated once per
thread, and the result is rounded once into the merged tensor: no operand is ever held in float32 as a whole.

The kernels are elementwise, so neither the block size nor the number of threads changes a bit of the result.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from unmergeable.errors import BadInput

# Half a megabyte of float32. Smaller blocks pay torch's cost per call (twice the time at 2**14); with larger ones
# the operands and the spare buffers of one block no longer share a second-level cache.
BLOCK_ELEMENTS = 2**17

FLOATING_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Kernel = Callable[[list[Tensor], list[Tensor]], Tensor]
"""``kernel(blocks, spare) -> block``: the merge of one block, in the compute dtype.

``blocks`` hold the operands and ``spare`` are buffers of the same length with arbitrary content. The kernel may
overwrite all of them, and returns one of them.
"""


@dataclass(frozen=True)
class Operand:
    """One model's share of one tensor.

    ``read`` starts a fresh pass: consecutive one-dimensional blocks in the stored dtype, each of
    ``BLOCK_ELEMENTS`` elements but the last. A block is valid until the next one is asked for.
    ``label`` names the model in messages.
    """

    label: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Iterable[Tensor]]
    device: torch.device

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def tensor_operand(label: str, tensor: Tensor) -> Operand:
    """An operand that lies in memory; the tensor is read and never written."""
    return Operand(
        label=label,
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        read=partial(tensor_blocks, tensor),
        device=tensor.device,
    )


def tensor_blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor in storage order, cut into blocks that share its memory."""
    flat = tensor.detach().reshape(-1)
    return (flat[start : start + BLOCK_ELEMENTS] for start in range(0, flat.numel(), BLOCK_ELEMENTS))


class Scratch(threading.local):
    """Buffers that each thread keeps from one tensor to the next."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}

    def take(self, count: int, length: int, *, like: Operand) -> list[Tensor]:
        """``count`` buffers of ``length`` elements in the compute dtype of ``like``; their content is arbitrary."""
        dtype = compute_dtype(like.dtype)
        buffers = self._buffers.setdefault((dtype, like.device), [])
        while len(buffers) < count:
            buffers.append(torch.empty(BLOCK_ELEMENTS, dtype=dtype, device=like.device))
        return [buffer[:length] for buffer in buffers[:count]]


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if stored == torch.float64 else torch.float32


def widened_blocks(
    operands: Sequence[Operand], scratch: Scratch, *, spare: int = 0
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Per block: every operand in the compute dtype, and ``spare`` further buffers. All may be overwritten."""
    for stored in zip(*(operand.read() for operand in operands), strict=True):
        buffers = scratch.take(len(operands) + spare, stored[0].numel(), like=operands[0])
        for buffer, block in zip(buffers, stored, strict=False):
            buffer.copy_(block)
        yield buffers[: len(operands)], buffers[len(operands) :]


def merge_blocks(name: str, operands: Sequence[Operand], kernel: Kernel, scratch: Scratch, *, spare: int = 0) -> Tensor:
    """Apply ``kernel`` block by block to tensor ``name`` and round once to the operands' dtype.

    Raises BadInput when the merge is not finite: a NaN must never be scored as a protection.
    """
    template = operands[0]
    merged = torch.empty(template.numel, dtype=template.dtype, device=template.device)
    start = 0
    for blocks, buffers in widened_blocks(operands, scratch, spare=spare):
        block = kernel(blocks, buffers)
        stop = start + block.numel()
        merged[start:stop].copy_(block)
        if not is_finite(merged[start:stop]):
            raise BadInput(_blame(name, operands))
        start = stop
    return merged.reshape(template.shape)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i weights[i] * tensors[i]``, left to right, in the memory of the first one."""
    total = tensors[0].mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # Any such element makes the sum so too, and a sum costs a twentieth of isfinite. It may also overflow by itself.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _blame(name: str, operands: Sequence[Operand]) -> str:
    for operand in operands:
        if not all(is_finite(block) for block in operand.read()):
            return f"{name}: {operand.label} holds NaN or infinity there; repair or leave out that checkpoint."
    return f"{name}: the merge overflows {operands[0].dtype}; lower the coefficients or use a wider dtype."
