"""Few-shot training whose gradients are projected off a disturbance; see :mod:`unmergeable.attacks.grad_erase`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from unmergeable.attacks.grad_erase import GradErase, project_off
from unmergeable.errors import Mismatch
from unmergeable.network.disk_weights import Piece, find_places
from unmergeable.network.few_shot import FewShotResult, few_shot
from unmergeable.network.tasks import Task
from unmergeable.progress import Progress, silent


def grad_erase(
    network: Any,
    weights: Mapping[str, Tensor],
    disturbances: Mapping[str, Tensor],
    train_task: Task,
    method: GradErase,
    *,
    progress: Progress = silent,
) -> FewShotResult:
    """Train ``weights`` as ``few_shot`` does, all of them, with other gradients.

    Args:
        network: of their architecture; it has its own weights again afterwards.
        weights: the merge, by the names on disk; they are copied.
        disturbances: of tensors by the names on disk (``estimate_disturbance``); others are trained freely.
        train_task: labelled examples, or texts for a causal language model.
        method: how much and how.
        progress: told of the steps.

    Raises:
        What ``few_shot`` raises; Mismatch for a disturbance of a tensor that the network does not have.
    """
    trained = partial(gradients_projected, disturbances=disturbances)
    return few_shot(network, weights, train_task, method.training, trained=trained, progress=progress)


@contextmanager
def gradients_projected(network: Any, disturbances: Mapping[str, Tensor]) -> Iterator[Callable[[str], bool]]:
    """Inside, the gradients of weights have no part in their disturbances. Yields that every parameter is trained.

    Of a tensor that the network stores in parts, each part is projected by itself.

    Raises:
        Mismatch: the network has no such tensor, or one of another shape.
    """
    places = find_places(network)
    with ExitStack() as hooks:
        for name, disturbance in disturbances.items():
            place = places.get(name)
            if place is None or place.shape != disturbance.shape:
                raise Mismatch(
                    f"{name}: no tensor of the network has this name and the shape {list(disturbance.shape)}."
                )
            for piece in place.pieces:
                its = disturbance.reshape(-1) if piece.on_disk is None else disturbance.reshape(-1)[piece.on_disk]
                hooks.callback(piece.parameter.register_hook(partial(_projected, piece, its)).remove)
        yield lambda name: True


def _projected(piece: Piece, disturbance: Tensor, gradient: Tensor) -> Tensor:
    flat = gradient.reshape(-1)
    disturbance = disturbance.to(gradient.device)
    if piece.inside is None:
        return project_off(flat, disturbance).to(gradient.dtype).reshape(gradient.shape)
    flat = flat.clone()  # hooks must not change what they are given
    flat[piece.inside] = project_off(flat[piece.inside], disturbance).to(gradient.dtype)
    return flat.reshape(gradient.shape)
