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

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unmergeable.attacks.few_shot import FewShot

Disturbance = Literal["task_vector", "reset_entries"]


@dataclass(frozen=True)
class GradErase:
    """``disturbance`` is how it is estimated; the rest as in :class:`~unmergeable.attacks.few_shot.FewShot`."""

    name: ClassVar[str] = "grad_erase"
    summary: ClassVar[str] = (
        "train a merge with gradients projected off the release's disturbance (--source the release)"
    )
    exact: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("base", "data", "sources")

    disturbance: Disturbance = "task_vector"
    samples: int = 100
    learning_rates: str = "3e-5,1e-4,3e-4,1e-3"
    steps: int = 100
    batch_size: int = 16
    seed: int = 0

    def validate(self) -> None:
        self.training.validate()

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
