"""Stage 1 of MergeGuard in a live network: fine-tuning with a penalty on weights (arXiv 2511.11851).

See :mod:`unmergeable.protections.mergeguard` for the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unmergeable.network.disk_weights import find_places
from unmergeable.network.fine_tune import fine_tune, gather_examples, padding_token
from unmergeable.network.low_rank import low_rank_updates
from unmergeable.network.tasks import Task, device_of
from unmergeable.network.train import Schedule
from unmergeable.network.training_state import Kept
from unmergeable.network.weight_penalty import weight_penalty
from unmergeable.progress import Progress, silent
from unmergeable.protections import MergeGuard


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
            precision=torch.bfloat16 if is_on_gpu else torch.float32,
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
