"""The squares of weights as a penalty in training: what pulls them towards zero.

Of a weight with a low-rank update beside it (:mod:`.low_rank`) the whole is meant, without ever being put together:

    |W + s B A|^2 = |W|^2 + 2 s <B^T W, A> + s^2 <B^T B, A A^T>
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unmergeable.protections.mergeguard import Penalty


def weight_penalty(
    network: nn.Module, layers: Sequence[Sequence[Tensor]], alpha: float, kind: Penalty
) -> Callable[[], Tensor]:
    """``alpha`` times the sum over layers of the sum, or the mean, of the squares of their weights: a scalar.

    Args:
        network: whose weights they are, with low-rank updates or without.
        layers: live parameters; an update of one is found by the weight it is of.
        alpha: its weight in the loss.
        kind: which; the mean is over each layer.
    """
    adapted: list[Any] = [module for module in network.modules() if _is_adapted(module)]
    updates = {id(module.base_layer.weight): module for module in adapted}
    device = layers[0][0].device

    def penalty() -> Tensor:
        total = torch.zeros((), device=device)
        with torch.autocast(device.type, enabled=False):  # sums of millions of squares need all of float32
            for weights in layers:
                squares = torch.stack([_square(weight, updates.get(id(weight))) for weight in weights]).sum()
                total = total + (squares if kind == "sum" else squares / sum(map(torch.numel, weights)))
        return alpha * total

    return penalty


def _is_adapted(module: Any) -> bool:
    """Whether it is one of peft's linear layers."""
    return "default" in getattr(module, "lora_A", ()) and hasattr(module, "base_layer")


def _square(weight: Tensor, update: Any | None) -> Tensor:
    flat = weight.reshape(-1)
    if update is None:
        return torch.dot(flat, flat)
    a: Tensor = update.lora_A["default"].weight
    b: Tensor = update.lora_B["default"].weight
    scale: float = update.scaling["default"]
    fixed = weight.detach()
    if not isinstance(update.base_layer, nn.Linear):  # GPT-2's layers are stored inputs by outputs
        fixed = fixed.T
    cross = ((b.T @ fixed) * a).sum()
    return torch.dot(flat.detach(), flat.detach()) + 2 * scale * cross + scale**2 * ((b.T @ b) * (a @ a.T)).sum()
