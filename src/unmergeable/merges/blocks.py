"""One tensor of every model in, one merged tensor out, in blocks that fit the processor's cache.

A merge reads each weight once and does a handful of operations on it, so its cost is memory traffic. The operands
arrive as blocks of ``BLOCK_ELEMENTS`` in their stored dtype, are widened into scratch that is allocated once per
thread, and the result is rounded once into the merged tensor: no operand is ever held in float32 as a whole.

The kernels are elementwise, so neither the block size nor the number of threads changes a bit of the result.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from unmergeable.checkpoint.finite import is_finite, not_finite
from unmergeable.errors import BadInput

# A megabyte of float32. Smaller blocks pay torch's cost per call, and threads hand Python's lock to each other more
# often (half as much time again at 2**15); with larger ones the buffers of a block no longer share a third-level cache.
BLOCK_ELEMENTS = 2**18

FLOATING_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Kernel = Callable[[list[Tensor], list[Tensor]], Tensor]
"""``kernel(blocks, spare) -> block``: the merge of one block, in the compute dtype.

``blocks`` hold the operands and ``spare`` are buffers of the same length with arbitrary content. The kernel may
overwrite all of them, and returns one of them.
"""


@dataclass(frozen=True)
class Operand:
    """One model's share of one tensor.

    ``read(size)`` starts a fresh pass: consecutive one-dimensional blocks of ``size`` elements, the last perhaps
    shorter, in the stored dtype. A block is valid until the next one is asked for.
    ``label`` names the model in messages. ``rows(start, count, size)`` reads the same of ``count`` rows only, the first
    axis counted; None where a tensor is computed.
    """

    label: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int], Iterable[Tensor]]
    device: torch.device
    rows: Callable[[int, int, int], Iterable[Tensor]] | None = None

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
        rows=lambda start, count, size: tensor_blocks(tensor[start : start + count], size),
    )


def tensor_blocks(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """The tensor in storage order, cut into blocks that share its memory."""
    flat = tensor.detach().reshape(-1)
    return (flat[start : start + size] for start in range(0, flat.numel(), size))


def in_one_dtype(operands: Sequence[Operand]) -> tuple[Operand, ...]:
    """The operands as they are where all have one dtype; else all in the widest that any of them computes in."""
    if len({operand.dtype for operand in operands}) <= 1:
        return tuple(operands)
    return in_compute_dtype(operands)


def in_compute_dtype(operands: Sequence[Operand]) -> tuple[Operand, ...]:
    """The operands in the widest dtype that any of them computes in. ``rows`` are read as they are stored."""
    dtype = max((accumulation_dtype(operand.dtype) for operand in operands), key=lambda width: width.itemsize)
    return tuple(replace(operand, dtype=dtype, read=partial(_widened, operand, dtype)) for operand in operands)


def _widened(operand: Operand, dtype: torch.dtype, size: int) -> Iterator[Tensor]:
    return (block.to(dtype) for block in operand.read(size))


class Scratch(threading.local):
    """Buffers that each thread keeps from one tensor to the next, and the memory of the merged tensor.

    ``out_dtype`` is the dtype of the merged tensors; None for that of the operands.
    """

    def __init__(self, out_dtype: torch.dtype | None = None) -> None:
        self.out_dtype = out_dtype
        self._destination: Tensor | None = None
        self._buffers: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}

    @contextmanager
    def into(self, destination: Tensor) -> Iterator[None]:
        """Let this thread's next merged tensor be this one."""
        self._destination = destination
        try:
            yield
        finally:
            self._destination = None

    def merged_like(self, template: Operand) -> Tensor:
        """An uninitialised merged tensor."""
        destination, self._destination = self._destination, None
        if destination is not None:
            return destination
        return torch.empty(template.shape, dtype=self.out_dtype or template.dtype, device=template.device)

    def take(self, count: int, length: int, *, like: Operand) -> list[Tensor]:
        """``count`` buffers of ``length`` elements in the compute dtype of ``like``; their content is arbitrary."""
        dtype = accumulation_dtype(like.dtype)
        buffers = self._buffers.setdefault((dtype, like.device), [])
        if buffers and len(buffers[0]) < length:
            buffers.clear()  # rows longer than a block: rare, so the old ones are not worth keeping
        while len(buffers) < count:
            buffers.append(torch.empty(max(BLOCK_ELEMENTS, length), dtype=dtype, device=like.device))
        return [buffer[:length] for buffer in buffers[:count]]


def accumulation_dtype(stored: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if stored == torch.float64 else torch.float32


def row_length(shape: tuple[int, ...]) -> int:
    """How many weights feed one output: the elements behind the first axis; all of a vector's; 1 for a scalar."""
    return max(1, torch.Size(shape[1:] if len(shape) > 1 else shape).numel())


def whole_rows(length: int) -> int:
    """The size of a block that holds whole rows of ``length`` elements, at least one."""
    return length * max(1, BLOCK_ELEMENTS // length)


def regrouped(blocks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same elements in blocks of ``size``."""
    held: list[Tensor] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += block.numel()
        if count >= size:
            joined = torch.cat(held)
            whole = count - count % size
            yield from joined[:whole].split(size)
            held, count = [joined[whole:]], count - whole
    if count:
        yield torch.cat(held)


def widened_blocks(
    operands: Sequence[Operand], scratch: Scratch, *, spare: int = 0, size: int = BLOCK_ELEMENTS
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Per block: every operand in the compute dtype, and ``spare`` further buffers. All may be overwritten."""
    for stored in zip(*(operand.read(size) for operand in operands), strict=True):
        buffers = scratch.take(len(operands) + spare, stored[0].numel(), like=operands[0])
        for buffer, block in zip(buffers, stored, strict=False):
            buffer.copy_(block)
        yield buffers[: len(operands)], buffers[len(operands) :]


def merge_blocks(
    name: str,
    operands: Sequence[Operand],
    kernel: Kernel,
    scratch: Scratch,
    *,
    spare: int = 0,
    size: int = BLOCK_ELEMENTS,
) -> Tensor:
    """Apply ``kernel`` block by block to tensor ``name`` and round once to the output dtype.

    Args:
        name: of the tensor, for messages.
        operands: what the kernel is given, the first one a model.
        kernel: the merge of one block.
        scratch: buffers, and the dtype of the result.
        spare: buffers the kernel needs beside the operands.
        size: elements of a block.

    Raises:
        BadInput: when the merge is not finite. A NaN must never be scored as a protection.
    """
    template = operands[0]
    merged = scratch.merged_like(template).reshape(-1)
    start = 0
    for blocks, buffers in widened_blocks(operands, scratch, spare=spare, size=size):
        block = kernel(blocks, buffers)
        stop = start + block.numel()
        merged[start:stop].copy_(block)
        if not is_finite(merged[start:stop]):
            _refuse(name, operands, merged.dtype)
        start = stop
    return merged.reshape(template.shape)


def merge_whole(
    name: str, operands: Sequence[Operand], merge: Callable[[list[Tensor]], Tensor], scratch: Scratch
) -> Tensor:
    """The same for a merge that needs the tensors as wholes, in the compute dtype and their shape.

    ``merge`` may overwrite what it is given.
    """
    tensors = [whole_tensor(operand) for operand in operands]
    merged = scratch.merged_like(operands[0])
    if not all(is_finite(tensor) for tensor in tensors):  # LAPACK stops at a NaN with an error of its own
        _refuse(name, operands, merged.dtype)
    merged.copy_(merge(tensors))
    if not is_finite(merged):
        _refuse(name, operands, merged.dtype)
    return merged


def whole_tensor(operand: Operand) -> Tensor:
    """The operand in the compute dtype and its shape."""
    whole = torch.empty(operand.numel, dtype=accumulation_dtype(operand.dtype), device=operand.device)
    start = 0
    for block in operand.read(BLOCK_ELEMENTS):
        whole[start : start + block.numel()].copy_(block)
        start += block.numel()
    return whole.reshape(operand.shape)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i weights[i] * tensors[i]``, left to right, in the memory of the first one."""
    total = tensors[0].mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def require_finite_operands(name: str, operands: Sequence[Operand]) -> None:
    """Raise BadInput naming the first model whose tensor holds NaN or infinity."""
    for operand in operands:
        if not all(is_finite(block) for block in operand.read(BLOCK_ELEMENTS)):
            raise BadInput(not_finite(name, operand.label))


def _refuse(name: str, operands: Sequence[Operand], out_dtype: torch.dtype) -> NoReturn:
    require_finite_operands(name, operands)
    raise BadInput(f"{name}: the merge overflows {out_dtype}; lower the coefficients or use a wider dtype.")
