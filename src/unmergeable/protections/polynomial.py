"""What ``taylor_mlp`` and ``mergebarrier`` share: feed-forwards become polynomials, calibrated on the owner's data.

Ranges of hidden units come from one pass of the data through the expert; the written network is compared with it on the
first batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.source import TensorSource
from unmergeable.data import DataSource
from unmergeable.errors import UsageError
from unmergeable.network.encoding import EncodedBatch, EncodedData, Encoder
from unmergeable.network.polynomial_network import load_polynomial_network
from unmergeable.network.tasks import device_of
from unmergeable.polynomials.layout import LAYOUTS, layout_of
from unmergeable.polynomials.rewriting import Rewriting, UnitRanges
from unmergeable.protections.activation_ranges import activation_ranges
from unmergeable.protections.base import Facts, Inputs, Protection, ProtectionRequirements, Rewrite
from unmergeable.threads import one_thread_per_kernel

CALIBRATION_BATCH = 4
CALIBRATION_EXAMPLES = 128


class PolynomialProtection(Protection):
    """Replaces feed-forwards by polynomials; ``rewriting`` of a subclass makes the checkpoint from the ranges."""

    remark: ClassVar[str] = (
        "The projections that a merge would average are not in the file; `recover --method taylor_inversion` solves "
        "for them in seconds."
    )

    @property
    def attack(self) -> str | None:
        return "taylor_inversion"

    def rewriting(
        self, source: TensorSource, architecture: Architecture, ranges: Mapping[str, UnitRanges]
    ) -> Rewriting:
        """The checkpoint to write; raises as :func:`unmergeable.polynomials.rewriting.rewriting`."""
        raise NotImplementedError

    def requirements(self) -> ProtectionRequirements:
        return ProtectionRequirements(needs=("data",), stage="structure")

    def unsupported(self, family: str) -> str | None:
        return None if family in LAYOUTS else "no network of polynomials is known for it"

    def check(self, inputs: Inputs) -> Facts:
        next(self._batches(inputs))  # data that cannot be read are refused before the network is loaded
        return PolynomialFacts()

    @one_thread_per_kernel()
    def prepare(self, inputs: Inputs) -> Rewrite:
        batches = self._batches(inputs)
        first = list(islice(batches, 1))
        network = inputs.load_expert()
        ranges = activation_ranges(network, inputs.architecture, chain(first, batches), progress=inputs.progress)
        planned = self.rewriting(inputs.expert, inputs.architecture, ranges)
        facts = PolynomialFacts(planned.errors)

        def verify(written: TensorSource) -> Facts:
            polynomials = load_polynomial_network(written.folder)
            return replace(facts, approximation=approximation(network, polynomials, first[0]))

        return Rewrite(
            source=planned.source,
            plan=planned.plan,
            recipe=self.recipe(),
            # Ranges come from the data: the same command on the same data makes the same bytes.
            resume_token=f"polynomials {self.recipe()} {inputs.extras.data} {CALIBRATION_EXAMPLES} {planned.errors}",
            facts=facts,
            config_changes=planned.config_changes,
            verify=verify,
        )

    def _batches(self, inputs: Inputs) -> chain[EncodedBatch]:
        """The data, after everything else that can be refused."""
        data = inputs.extras.data
        if data is None:
            raise UsageError(
                f"{self.name} is calibrated on data; give some of what the model is used for with data=FILE."
            )
        layout_of(inputs.architecture)
        limited = DataSource(data, limit=CALIBRATION_EXAMPLES)
        return chain(EncodedData(limited, Encoder(inputs.template), CALIBRATION_BATCH))


@dataclass(frozen=True)
class Approximation:
    """How far a network of polynomials is from the original on some data.

    ``output_error``: of its first output (logits, or hidden states), relative in the Frobenius norm. ``outside``: share
    of activations that the guard acted on, by feed-forward.
    """

    output_error: float
    outside: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        shares = self.outside.values()
        return {
            "output_error": self.output_error,
            "outside_largest": max(shares),
            "outside_mean": sum(shares) / len(shares),
        }


@dataclass(frozen=True)
class PolynomialFacts(Facts):
    """What polynomials report.

    ``errors``: within the calibrated ranges, by feed-forward, in units of the activation. ``approximation``: what the
    written network does on calibration data. Both are empty where only heads were changed, or nothing yet.
    """

    errors: Mapping[str, Mapping[str, float]] | None = None
    approximation: Approximation | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "polynomial_errors": {name: dict(error) for name, error in (self.errors or {}).items()},
            "approximation": self.approximation.to_json() if self.approximation else None,
        }

    def record(self) -> Mapping[str, Any]:
        if self.approximation is None:
            return {}
        return {"polynomial_errors": self.errors, "measured": self.approximation.to_json()}

    def lines(self) -> list[str]:
        if self.approximation is None or self.errors is None:
            return []
        measured = self.approximation.to_json()
        largest = max(error["largest"] for error in self.errors.values())
        return [
            f"Error of the network's output: {measured['output_error']:.1e} relative, on data it was calibrated on",
            f"Largest error of a hidden unit within the range it was seen in: {largest:.1e}",
            f"Activations outside that range: {measured['outside_mean']:.2%}, {measured['outside_largest']:.2%} in one "
            "layer",
            "It runs its own code: load it with trust_remote_code=True. Measure your task before you publish it.",
        ]


@torch.no_grad()
def approximation(original: Any, polynomials: Any, batch: EncodedBatch) -> Approximation:
    """Run both networks on one batch; padding does not count."""
    # The module that is copied beside the weights. It imports transformers, which most commands do without.
    modeling = importlib.import_module("unmergeable.polynomials.modeling_polynomial")
    moved = batch.to(device_of(original))
    with modeling.guard_counted(polynomials) as counts:
        measured = _output(polynomials, moved)
    expected = _output(original, moved)
    outside = {name: acted / max(1, seen) for name, (acted, seen) in counts.items()}
    return Approximation(float((measured - expected).norm() / expected.norm()), outside)


def _output(network: Any, batch: EncodedBatch) -> Tensor:
    return batch.visible(network(**batch.inputs)[0]).to(torch.float64)
