"""anchor_repulsive: fine-tuning that takes attention away from the base, so that the base is no anchor any more.

Anchor-Repulsive Fine-tuning (arXiv 2606.30360, "On the Vulnerability of Parameter-Level Defenses to Model Merging").
Methods that change the basis (``mergelock``, ``params``, ``gauge``) are undone by whoever aligns the release with the
base, because a fine-tune lies so near to it. The paper's answer is to fine-tune with a penalty of a margin that pushes
attention weights away from the base, before the basis is changed:

    d(W) = |W - W_0| / |W_0|                                       Frobenius norms; W_0 the base's
    L    = cross-entropy + strength * mean over W of max(0, margin - d(W))

over the matrices of attention. Apply it first: ``--method anchor_repulsive,mergelock``.

From public text we know the aim, that attention weights are repelled, and that there is a margin. Ours, for want of the
formula: that distances are relative and per matrix, the hinge and its mean, all defaults, that it starts from the
expert, and that only weights in the numbered blocks are trained. A matrix that equals the base's has no direction to go
away in; it gets a random one of a thousandth of the margin.

What it does not stop: it hides nothing and traps nothing. Without a change of basis behind it a merge is one with an
expert whose update is longer, which a smaller coefficient scales back. With one, an alignment comes less near to what
the release was, and near enough to merge it: ``docs/fine-tuned.md`` has figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from unmergeable.network.fine_tune import fine_tune
from unmergeable.network.precision import FULL, Precision
from unmergeable.network.train import Schedule
from unmergeable.protections.trained import TrainedProtection, TrainingRun
from unmergeable.randomness import Stream
from unmergeable.settings import ADDED_LATER


@dataclass(frozen=True)
class AnchorRepulsive(TrainedProtection):
    """``steps`` of AdamW at ``learning_rate`` (its peak) on batches of ``batch_size``.

    ``strength`` of the penalty, and the ``margin``, in norms of the base's matrix, beyond which there is none.
    ``examples`` of the data are used at most.
    ``precision`` in which the losses are computed.
    """

    name: ClassVar[str] = "anchor_repulsive"
    summary: ClassVar[str] = "training that takes attention weights away from the base, for a change of basis behind it"
    remark: ClassVar[str] = (
        "Meant against alignment with the base, together with an exact method behind it, as in "
        "anchor_repulsive,mergelock; alone it is an expert with a longer update. Compare the accuracies: it changes "
        "what the model computes."
    )

    trains_adapters: ClassVar[bool] = False  # behind it stands a change of basis, which an adapter cannot have

    steps: int = 1000
    learning_rate: float = 1e-4
    batch_size: int = 32
    strength: float = 1.0
    margin: float = 1.0
    examples: int = 4000
    precision: Precision = field(default=FULL, metadata=ADDED_LATER)

    def validate(self) -> None:
        super().validate()
        self.require_not_negative("strength")
        self.require(0 < self.margin <= 100, "margin", "lie above 0, and be at most 100")

    def train(self, run: TrainingRun) -> list[float]:
        parameters = run.parameters
        repelled = {name: parameters[name] for name in run.attention if parameters[name].dim() > 1}
        stream = Stream.from_seed(run.seed).child(self.name)
        base = {name: run.base[name] for name in sorted(repelled)}
        if self.strength:
            for name, origin in base.items():
                _leave(repelled[name], origin, self.margin / 1000, stream.child(name))
        return fine_tune(
            run.network,
            run.predict,
            run.examples,
            Schedule(self.steps, self.learning_rate),
            batch_size=self.batch_size,
            is_trained=run.is_trained,
            penalty=(lambda: self.strength * too_near(repelled, base, self.margin)) if self.strength and base else None,
            seed=run.seed,
            kept=run.kept,
            precision=self.precision,
            stage="leaving the base",
            progress=run.progress,
        )


def distances(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Of every matrix from the base's, in norms of the base's."""
    for name, origin in base.items():
        yield torch.linalg.vector_norm(weights[name] - origin) / torch.linalg.vector_norm(origin).clamp_min(1e-30)


def too_near(weights: Mapping[str, Tensor], base: Mapping[str, Tensor], margin: float) -> Tensor:
    """The mean, over matrices, of what their distance lacks to the margin."""
    return torch.stack([(margin - distance).clamp_min(0) for distance in distances(weights, base)]).mean()


@torch.no_grad()
def _leave(weight: nn.Parameter, origin: Tensor, distance: float, stream: Stream) -> None:
    """Move a matrix that equals the base's by a relative ``distance`` in a random direction."""
    if torch.equal(weight, origin):
        direction = torch.from_numpy(stream.normal(weight.numel())).reshape(weight.shape).to(weight)
        weight.add_(direction * (distance * torch.linalg.vector_norm(origin) / torch.linalg.vector_norm(direction)))
