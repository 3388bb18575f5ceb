"""How large the inputs of every linear layer are: ||x_j||_2 over all tokens or patches, which Wanda's score needs.

One pass over the data; of each batch only sums of squares are kept, one number per input of a layer. Padding does not
count. A layer that is never called has norms of zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.linear_layers import linear_layers
from unmergeable.network.tasks import answer, device_of
from unmergeable.progress import Progress, silent
from unmergeable.protections.sensitivity_shield.arithmetic import InputNorms


@torch.no_grad()
def input_norms(network: Any, batches: Iterable[EncodedBatch], *, progress: Progress = silent) -> dict[str, InputNorms]:
    """Norms by the name of the layer's weight on disk, from one pass of ``batches`` through ``network``.

    Raises:
        BadInput: there are no batches, the network does not take them, or its activations are not finite.
    """
    layers = linear_layers(network)
    squares = {layer.name: torch.zeros(layer.inputs, dtype=torch.float64) for layer in layers}
    device, seen = device_of(network), 0
    for batch in batches:
        moved = batch.to(device)
        with ExitStack() as hooks:
            for layer in layers:
                hook = layer.module.register_forward_pre_hook(partial(_add_squares, squares[layer.name], moved))
                hooks.callback(hook.remove)
            answer(network, moved)  # whatever it is: no head is needed
        seen += len(batch)
        progress("inputs of layers", seen, 0, "examples")  # of how many is not known
    if seen == 0:
        raise BadInput("no examples to score weights on; give data that has some.")
    for name, total in squares.items():
        if not bool(total.isfinite().all()):
            raise BadInput(f"{name}: its inputs on the data are not finite; check that the model works on them.")
    return {layer.name: InputNorms(layer.axis, squares[layer.name].sqrt()) for layer in layers}


def _add_squares(total: Tensor, batch: EncodedBatch, module: Any, arguments: tuple[Tensor, ...]) -> None:
    total += batch.visible(arguments[0]).to(torch.float64).square().sum(0).cpu()
