"""What of two networks is compared where one is to do as the other does: what both put out, and hidden states.

Outputs are compared as they are: logits by T^2 KL(teacher || student) of softmaxes at temperature T, features by their
squared distance, relative to their spread. Hidden states are compared through the similarity transformation that fits
them best before anything is learnt (:mod:`unmergeable.network.similarity`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import select
from unmergeable.network.outputs import LOGITS, Outputs, outputs_of, widths_of
from unmergeable.network.similarity import PairedMoments, Similarity
from unmergeable.network.tasks import device_of

AGREES = 0.5
"""Share of a hidden state's spread that the student's must explain in its best basis; 0.1 is what chance gives."""

ROWS_PER_COORDINATE = 8
"""Of hidden states that a similarity is fitted to."""

ROUNDING = 1e-9
"""Squared relative distance below which two networks answer alike: 2^-24, grown 500-fold on the way."""


@dataclass(frozen=True)
class Comparison:
    """What of a teacher and a student is compared.

    Attributes:
        kind: of output (:mod:`unmergeable.network.outputs`).
        spread: of the teacher's outputs: their mean squared distance from their mean.
        layers: numbers of hidden states, each with what brings the student's to the teacher's.
        temperature: of softmaxes.
        batch_size: examples looked at at a time.
    """

    kind: str
    spread: float
    layers: Mapping[int, Similarity]
    temperature: float
    batch_size: int

    @classmethod
    @torch.no_grad()
    def between(
        cls, teacher: Any, student: Any, examples: EncodedBatch, *, layers: int, temperature: float, batch_size: int
    ) -> Comparison:
        """Of two networks on one device, from as many examples as the similarities need.

        Args:
            teacher: the one that stays as it is.
            student: as it is before it learns.
            examples: inputs of both.
            layers: the most hidden states to compare, spread over the depth.
            temperature, batch_size: as in the class.

        Raises:
            BadInput: a network does not take the inputs, or the outputs have nothing in common.
        """
        kind = _common_kind(teacher, student, examples)
        moments: dict[int, PairedMoments] = {}
        outputs: list[Tensor] = []
        for numbers in torch.arange(len(examples)).split(batch_size):
            batch = select(examples, numbers).to(device_of(student))
            theirs, ours = (outputs_of(network, batch, kind, with_states=layers > 0) for network in (teacher, student))
            outputs.append(theirs.rows[:0] if theirs.is_logits else theirs.rows)
            for number in _numbers(theirs, ours, layers):
                first, second = ours.states[number], theirs.states[number]
                moments.setdefault(number, PairedMoments(first.shape[1], first.device)).add(first, second)
            if all(one.rows >= ROWS_PER_COORDINATE * ours.states[n].shape[1] for n, one in moments.items()):
                break
        fitted = {number: one.fit() for number, one in moments.items()}
        agreeing = {number: fit for number, fit in fitted.items() if fit is not None and fit.explained >= AGREES}
        return cls(kind, _spread(torch.cat(outputs)), agreeing, temperature, batch_size)

    def loss(self, teacher: Any, student: Any, batch: EncodedBatch) -> Tensor:
        """The student's distance to the teacher on a batch, a scalar."""
        theirs, ours = self._run(teacher, student, batch)
        value = self._output_distance(ours.rows, theirs.rows)
        if self.layers:
            value = value + torch.stack(self._state_distances(ours, theirs)).mean()
        return value

    @torch.no_grad()
    def distances(self, teacher: Any, student: Any, examples: EncodedBatch) -> tuple[float, ...]:
        """Of the hidden states, on the first batch of examples."""
        batch = select(examples, torch.arange(min(self.batch_size, len(examples)))).to(device_of(student))
        theirs, ours = self._run(teacher, student, batch)
        return tuple(float(distance) for distance in self._state_distances(ours, theirs))

    @torch.no_grad()
    def are_alike(self, teacher: Any, student: Any, examples: EncodedBatch) -> bool:
        """Whether nothing but rounding is there to learn: Adam would take steps of full length after it."""
        batches = (select(examples, numbers) for numbers in torch.arange(len(examples)).split(self.batch_size))
        return all(self._is_alike(*self._run(teacher, student, batch.to(device_of(student)))) for batch in batches)

    def _is_alike(self, theirs: Outputs, ours: Outputs) -> bool:
        if ours.rows.shape != theirs.rows.shape:
            return False
        error = float((ours.rows - theirs.rows).square().sum() / theirs.rows.square().sum().clamp_min(1e-30))
        return error <= ROUNDING and all(float(one) <= ROUNDING for one in self._state_distances(ours, theirs))

    def _run(self, teacher: Any, student: Any, batch: EncodedBatch) -> tuple[Outputs, Outputs]:
        with_states = bool(self.layers)
        with torch.no_grad():
            theirs = outputs_of(teacher, batch, self.kind, with_states=with_states)
        return theirs, outputs_of(student, batch, self.kind, with_states=with_states)

    def _state_distances(self, ours: Outputs, theirs: Outputs) -> list[Tensor]:
        return [fit.distance(ours.states[number], theirs.states[number]) for number, fit in self.layers.items()]

    def _output_distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.kind != LOGITS:
            return (ours - theirs).square().sum(dim=-1).mean() / self.spread
        # Tokens that one of them had added at the end of its vocabulary are none of the other's.
        shared = min(ours.shape[-1], theirs.shape[-1])
        learnt, taught = (
            functional.log_softmax(rows[:, :shared].float() / self.temperature, dim=-1) for rows in (ours, theirs)
        )
        return functional.kl_div(learnt, taught, log_target=True, reduction="batchmean") * self.temperature**2


def _numbers(theirs: Outputs, ours: Outputs, layers: int) -> Sequence[int]:
    """Of hidden states that can be compared, spread over the depth: neither the first nor, as outputs are, the last."""
    last = len(ours.states) - 1
    if len(theirs.states) != len(ours.states) or last < 2:
        return ()
    spread = sorted({round(place * last / (layers + 1)) for place in range(1, layers + 1)} - {0, last})
    return [number for number in spread if theirs.states[number].shape == ours.states[number].shape]


def _spread(rows: Tensor) -> float:
    """Mean squared distance from the mean; of a row alone its square."""
    if len(rows) < 2:
        return float(rows.double().square().sum()) or 1.0
    return float((rows.double() - rows.double().mean(dim=0)).square().sum(dim=-1).mean()) or 1.0


def _common_kind(teacher: Any, student: Any, examples: EncodedBatch) -> str:
    """What both put out, in the same width unless it is logits."""
    one = select(examples, torch.arange(1)).to(device_of(student))
    theirs, ours = (widths_of(network, one) for network in (teacher, student))
    for kind in (kind for kind in theirs if kind in ours):
        if kind == LOGITS or theirs[kind] == ours[kind]:
            return kind
    raise BadInput(
        f"the release ({type(teacher).__name__}) and the student ({type(student).__name__}) put out nothing that can "
        "be compared; give a base whose network has the release's head."
    )
