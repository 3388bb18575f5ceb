"""What ``taylor_mlp`` and ``mergebarrier`` share: feed-forwards become polynomials, calibrated on the owner's data.

Ranges of hidden units come from one pass of the data through the expert; the written network is compared with it on
data it was calibrated on, on data that was held out, and on text of other kinds (:mod:`.calibration`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import UsageError
from unmergeable.network.encoding import Encoder
from unmergeable.network.polynomial_network import load_polynomial_network
from unmergeable.polynomials.layout import LAYOUTS, layout_of
from unmergeable.polynomials.rewriting import Rewriting, UnitRanges
from unmergeable.protections.activation_ranges import activation_ranges
from unmergeable.protections.base import Facts, Inputs, Protection, ProtectionRequirements, Rewrite
from unmergeable.protections.calibration import (
    CALIBRATION_EXAMPLES,
    Approximation,
    Calibration,
    Judgement,
    approximation,
    approximation_or_none,
)
from unmergeable.threads import one_thread_per_kernel


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
        return ProtectionRequirements(needs=("data",), accepts=("encoder",), stage="structure")

    def unsupported(self, family: str) -> str | None:
        return None if family in LAYOUTS else "no network of polynomials is known for it"

    def check(self, inputs: Inputs) -> Facts:
        # Data that cannot be read or encoded are refused before the network is loaded.
        next(iter(self._calibration(inputs).batches(limit=1)))
        return PolynomialFacts()

    @one_thread_per_kernel()
    def prepare(self, inputs: Inputs) -> Rewrite:
        calibration = self._calibration(inputs)
        first = next(iter(calibration.batches(limit=1)))
        network = inputs.load_expert()
        ranges = activation_ranges(network, inputs.architecture, calibration.batches(), progress=inputs.progress)
        planned = self.rewriting(inputs.expert, inputs.architecture, ranges)
        facts = PolynomialFacts(planned.errors)

        def verify(written: TensorSource) -> Facts:
            polynomials = load_polynomial_network(written.folder)
            judged = Judgement(
                calibration.examples,
                calibration.tokens,
                approximation(network, polynomials, [first]),
                approximation_or_none(network, polynomials, calibration.held_out()),
                approximation_or_none(network, polynomials, calibration.general()),
            )
            judged.require_bearable(self.name)
            return replace(facts, judgement=judged)

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

    def _calibration(self, inputs: Inputs) -> Calibration:
        """The data, after everything else that can be refused."""
        data = inputs.extras.data
        if data is None:
            raise UsageError(
                f"{self.name} is calibrated on data; give some of what the model is used for with data=FILE."
            )
        layout_of(inputs.architecture)
        return Calibration.of(data, Encoder(inputs.encoder))


@dataclass(frozen=True)
class PolynomialFacts(Facts):
    """What polynomials report.

    ``errors``: within the calibrated ranges, by feed-forward, in units of the activation. ``judgement``: what the
    written network does on data. Both are empty where only heads were changed, or nothing yet.
    """

    errors: Mapping[str, Mapping[str, float]] | None = None
    judgement: Judgement | None = None

    @property
    def approximation(self) -> Approximation | None:
        """On data it was calibrated on."""
        return None if self.judgement is None else self.judgement.in_sample

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self.judgement is None else self.judgement.warnings()

    def to_json(self) -> dict[str, Any]:
        return {
            "polynomial_errors": {name: dict(error) for name, error in (self.errors or {}).items()},
            "approximation": self.judgement.to_json() if self.judgement else None,
        }

    def record(self) -> Mapping[str, Any]:
        if self.judgement is None:
            return {}
        return {"polynomial_errors": self.errors, "measured": self.judgement.to_json()}

    def lines(self) -> list[str]:
        if self.judgement is None or self.errors is None:
            return []
        largest = max(error["largest"] for error in self.errors.values())
        return [
            *self.judgement.lines(),
            f"Largest error of a hidden unit within the range it was seen in: {largest:.1e}",
            "It runs its own code: load it with trust_remote_code=True. Measure your task before you publish it.",
        ]
