"""Some numbers of a tensor, without the rest of it."""

from __future__ import annotations

import torch

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.source import ChunkSource, RenamedSource, TensorSource

STRETCHES = 8


def sample(source: TensorSource, name: str, most: int) -> torch.Tensor:
    """At most ``most`` numbers of a tensor: a few stretches that lie evenly from its first number to its last.

    The same places of every tensor of one shape. What is stored is read there alone; what has to be computed, as an
    adapter's tensor, is computed whole.

    Args:
        source: the checkpoint.
        name: of the tensor.
        most: how many; at least :data:`STRETCHES`.

    Returns:
        The numbers in stored dtype, flat; all of them where there are no more than ``most``.

    Raises:
        CheckpointError: for a name that the source does not hold, or a file that cannot be read.
    """
    spec = source.spec(name)
    if isinstance(source, RenamedSource):
        return sample(source.original, source.original_name.get(name, name), most)
    if spec.numel <= most:
        return source.tensor(name).flatten()
    length = most // STRETCHES
    starts = [number * (spec.numel - length) // (STRETCHES - 1) for number in range(STRETCHES)]
    if not isinstance(source, ChunkSource):
        flat = source.tensor(name).flatten()
        return torch.cat([flat[start : start + length] for start in starts])
    dtype = torch_dtype(spec.dtype)
    wanted = [(start * dtype.itemsize, (start + length) * dtype.itemsize) for start in starts]
    pieces = (source.raw_chunks(name, end - begin, start=begin, stop=end) for begin, end in wanted)
    return torch.cat([torch.frombuffer(piece, dtype=dtype).clone() for chunks in pieces for piece in chunks])
