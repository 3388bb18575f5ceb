"""Streams that join one softmax: which tokens of queries, keys or values come from projections of their own.

Text and an image that attend to both (SD 3, Flux) stand one behind the other in the queries, keys and values of one
attention, each made by its own weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmergeable.derivation.probe import reached
from unmergeable.derivation.scene import Scene

MOST_STREAMS = 3

Run = slice
"""Tokens that stand side by side."""


def runs(scene: Scene, tensor: Tensor, sources: Sequence[int]) -> list[Run]:
    """The tokens of every stream in ``tensor`` [..., heads, tokens, size], in the order in which the streams are made.

    ``sources`` are the products that it may come from. All tokens are one run unless each of two or three runs comes
    from products that no other comes from.
    """
    count = tensor.shape[-2]
    whole = [slice(0, count)]
    outputs = scene.outputs(sources)
    ends = reached(tensor, outputs, (0, count - 1))
    if count < 2 or not sources or bool((ends[0] == ends[1]).all()):
        return whole
    table = reached(tensor, outputs, range(count))
    changes = [token for token in range(1, count) if bool((table[token] != table[token - 1]).any())]
    found = [slice(start, stop) for start, stop in zip([0, *changes], [*changes, count], strict=True)]
    made = torch.stack([table[run.start] for run in found])
    own = made & (made.sum(0, keepdim=True) == 1)
    if len(found) > MOST_STREAMS or not bool(own.any(1).all()):
        return whole
    order = own.int().argmax(1).tolist()
    return [run for _, run in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def tokens_of(tensor: Tensor, run: Run) -> Tensor:
    """The tokens of one stream in ``tensor`` [..., tokens, coordinates]."""
    return tensor[..., run, :]


def stream_read(inputs: Tensor, query: Tensor, found: Sequence[Run]) -> int:
    """The stream whose queries gathered the first token of ``inputs`` [..., tokens, coordinates]."""
    if len(found) == 1:
        return 0
    (grad,) = torch.autograd.grad(inputs[..., 0, :].square().sum(), [query], retain_graph=True)
    seen = grad.abs().movedim(-2, 0).reshape(query.shape[-2], -1).sum(1)
    return max(range(len(found)), key=lambda stream: float(seen[found[stream]].sum()))
