"""``grad_erase``: train a merge on a few examples, with gradients that leave the protected model's disturbance alone.

    g <- g - d <g, d> / <d, d>          tensor by tensor

An adaptive attack considered with MergeGuard (arXiv 2511.11851): the disturbance d is estimated from the release, and
what the gradient says about it is erased, so that training moves the merge only where the owner did not. PROTECTED is
the merge, and the release is given as a source, as for ``unmask``.

The paper does not say how d is estimated, so that it is a setting here:

===================  ===================================================================================================
``task_vector``      d = release - base, one direction in every tensor
``reset_entries``    every entry in which the release equals the base, which is what MergeGuard's second stage leaves
                     behind; gradients vanish there, and these entries stay as the merge has them
===================  ===================================================================================================

Nor does it name an optimizer. AdamW, which is used here, scales the step of each weight by itself: with ``task_vector``
the gradients are at right angles to d and the steps nearly so, with ``reset_entries`` both exactly. All else (examples,
choice of the rate, comparison without the victim) is as in ``few_shot``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unmergeable.attacks.base import AttackRequirements, Inputs, Recovered
from unmergeable.attacks.few_shot import FewShot, FewShotResult, compared, few_shot
from unmergeable.attacks.live import load, state_for, state_without_victim
from unmergeable.attacks.task_vectors import common_tensors
from unmergeable.errors import Mismatch, UsageError
from unmergeable.network.disk_weights import Piece, find_places
from unmergeable.network.tasks import Task
from unmergeable.progress import Progress, silent

Disturbance = Literal["task_vector", "reset_entries"]


@dataclass(frozen=True)
class GradErase:
    """``disturbance`` is how it is estimated; the rest as in :class:`~unmergeable.attacks.few_shot.FewShot`."""

    name: ClassVar[str] = "grad_erase"
    summary: ClassVar[str] = (
        "train a merge with gradients projected off the release's disturbance (--source the release)"
    )

    disturbance: Disturbance = "task_vector"
    samples: int = 100
    learning_rates: str = "3e-5,1e-4,3e-4,1e-3"
    steps: int = 100
    batch_size: int = 16
    seed: int = 0

    def validate(self) -> None:
        self.training.validate()

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(needs=("base", "data", "sources"), structure="polynomial")

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Train the merge ``inputs.protected``, and the base for comparison; the one source is the release.

        Raises:
            UsageError: unless there is exactly one source.
            Mismatch: the base is no model of the merge's architecture.
            BadInput: the examples cannot be used.
        """
        if len(inputs.sources) != 1:
            raise UsageError(
                "grad_erase: PROTECTED is the merged model; give the protected release it contains as --source."
            )
        (release,) = inputs.sources
        data = inputs.require_data(self.name)
        network = load(inputs.protected)
        start = state_for(network, inputs.protected)
        task = data.labelled(network, samples=self.samples, seed=self.seed)
        disturbances = {
            name: estimate_disturbance(release.tensor(name), inputs.base.tensor(name), self.disturbance)
            for name in common_tensors([inputs.protected, release, inputs.base])
            if name in start
        }
        attack = grad_erase(network, start, disturbances, task, self, progress=progress)
        start = state_without_victim(network, inputs.base, inputs)
        control = grad_erase(network, start, disturbances, task, self, progress=progress)
        return compared(inputs, attack, inputs.base, control)

    @property
    def training(self) -> FewShot:
        """The training that gradients are changed in."""
        return FewShot(self.samples, self.learning_rates, self.steps, self.batch_size, seed=self.seed)


def estimate_disturbance(release: Tensor, base: Tensor, kind: Disturbance) -> Tensor:
    """Of one tensor: a direction, or for ``reset_entries`` a bool for each entry, in the tensor's shape."""
    if kind == "reset_entries":
        return release == base
    return release.to(torch.promote_types(release.dtype, torch.float32)) - base


def project_off(gradient: Tensor, disturbance: Tensor) -> Tensor:
    """The gradient without its part along a direction, or in marked entries; both of one shape."""
    if disturbance.dtype == torch.bool:
        return gradient.masked_fill(disturbance, 0.0)
    squared = disturbance.square().sum()
    if squared == 0:
        return gradient
    return gradient - disturbance * ((gradient * disturbance).sum() / squared)


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
        method: the settings.
        progress: called with the steps done.

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
                flat = disturbance.reshape(-1)
                part = flat if piece.on_disk is None else flat[piece.on_disk]
                hooks.callback(piece.parameter.register_hook(partial(_projected, piece, part)).remove)
        yield lambda name: True


def _projected(piece: Piece, disturbance: Tensor, gradient: Tensor) -> Tensor:
    flat = gradient.reshape(-1)
    disturbance = disturbance.to(gradient.device)
    if piece.inside is None:
        return project_off(flat, disturbance).to(gradient.dtype).reshape(gradient.shape)
    flat = flat.clone()  # hooks must not change what they are given
    flat[piece.inside] = project_off(flat[piece.inside], disturbance).to(gradient.dtype)
    return flat.reshape(gradient.shape)
