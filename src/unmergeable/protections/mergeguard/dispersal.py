"""Stage 1 of MergeGuard in a live network: fine-tuning with a penalty on the squares of weights (arXiv 2511.11851).

:mod:`.method` has the formula. Of a weight with a low-rank update beside it (:mod:`unmergeable.network.low_rank`) the
whole is penalised, without ever being put together:

    |W + s B A|^2 = |W|^2 + 2 s <B^T W, A> + s^2 <B^T B, A A^T>
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from unmergeable.network.disk_weights import find_places
from unmergeable.network.fine_tune import fine_tune, gather_examples, padding_token
from unmergeable.network.low_rank import low_rank_updates
from unmergeable.network.precision import FULL
from unmergeable.network.tasks import Task, device_of
from unmergeable.network.train import Schedule
from unmergeable.network.training_state import Kept
from unmergeable.progress import Progress, silent

if TYPE_CHECKING:
    from unmergeable.protections.mergeguard.method import MergeGuard

Penalty = Literal["sum", "mean"]


def disperse(
    network: Any,
    task: Task,
    layers: Mapping[str, Sequence[str]],
    method: MergeGuard,
    *,
    seed: int = 0,
    kept: Kept | None = None,
    progress: Progress = silent,
) -> list[float]:
    """Fine-tune the network in place, and return the loss of each step, penalty included.

    On a GPU losses are computed in bfloat16 by automatic mixed precision; weights stay as they are.

    Args:
        network: live, its weights in float32.
        task: labelled examples; one pass of them is kept in memory.
        layers: names on disk of the weights to train and to penalise, by layer.
        method: what to do.
        seed: of the order of the examples, of dropout and of low-rank updates.
        kept: where the state of the run is kept, so that the same call goes on after a kill.

    Raises:
        BadInput: no labels, or the network does not take the examples.
        UnmergeableError: the training diverged.
    """
    places = find_places(network)
    weights = [
        list({id(piece.parameter): piece.parameter for name in names for piece in places[name].pieces}.values())
        for names in layers.values()
    ]
    examples = gather_examples(task, sum(map(len, task.batches)), pad=padding_token(network))
    is_on_gpu = device_of(network).type != "cpu"
    with _trained(network, weights, method.low_rank, seed) as is_trained:
        return fine_tune(
            network,
            task.predict,
            examples,
            Schedule(method.steps, method.learning_rate),
            batch_size=method.batch_size,
            is_trained=is_trained,
            penalty=weight_penalty(network, weights, method.alpha, method.penalty) if method.alpha else None,
            seed=seed,
            kept=kept,
            precision="bfloat16" if is_on_gpu else FULL,
            stage="dispersing",
            progress=progress,
        )


@contextmanager
def _trained(
    network: Any, weights: Sequence[Sequence[Tensor]], rank: int, seed: int
) -> Iterator[Callable[[str], bool]]:
    """Which parameters are trained, by module name: the weights, or the low-rank updates of them."""
    chosen = {id(weight) for its in weights for weight in its}
    if rank == 0:
        names = {name for name, parameter in network.named_parameters() if id(parameter) in chosen}
        yield names.__contains__
        return
    with low_rank_updates(network, rank=rank, alpha=rank, seed=seed) as is_update:
        adapted = {
            name
            for name, module in network.named_modules()
            if hasattr(module, "base_layer") and id(module.base_layer.weight) in chosen
        }
        yield lambda name: is_update(name) and name.rpartition(".lora_")[0] in adapted


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
