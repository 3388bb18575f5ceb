"""The data that polynomials are calibrated on, and a judgement of what came of it.

A hidden unit is approximated over the range it was seen in, so that everything depends on what was seen: an error on
the same data says little, and says nothing of text of another kind.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmergeable.data import DataSource, Example
from unmergeable.errors import NotEquivalent
from unmergeable.network.encoding import EncodedBatch, Encoder
from unmergeable.network.tasks import device_of
from unmergeable.protections.general_text import GENERAL_TEXT

CALIBRATION_BATCH = 4
CALIBRATION_EXAMPLES = 128
HELD_OUT_EXAMPLES = 16
HELD_OUT_EVERY = 8
"""Of so few examples that all of them would be calibrated on, every eighth is held out."""

FEW_TOKENS = 1000
"""Ranges that were seen on fewer are a warning."""

NOTICEABLE_ERROR = 0.01
"""Relative error of the output on held-out data beyond which the owner is warned."""

LARGEST_ERROR = 0.5
"""Relative error of the output on held-out data beyond which nothing is written: it is another network."""

NOTICEABLE_OUTSIDE = 0.05
"""Share of activations outside the calibrated ranges, on text of other kinds, beyond which the owner is warned."""


@dataclass(frozen=True)
class Calibration:
    """Examples to calibrate on, ``seen``, and examples that were kept from it, ``kept``."""

    seen: Sequence[Example]
    kept: Sequence[Example]
    encoder: Encoder

    @classmethod
    def of(cls, data: Path, encoder: Encoder) -> Calibration:
        """Up to 128 examples and what follows them; of fewer, every eighth is held out.

        Raises:
            BadInput: the data cannot be read.
        """
        examples = list(DataSource(data, limit=CALIBRATION_EXAMPLES + HELD_OUT_EXAMPLES))
        if len(examples) > CALIBRATION_EXAMPLES:
            return cls(examples[:CALIBRATION_EXAMPLES], examples[CALIBRATION_EXAMPLES:], encoder)
        kept = examples[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        return cls([example for example in examples if not any(example is other for other in kept)], kept, encoder)

    @property
    def examples(self) -> int:
        return len(self.seen)

    @property
    def tokens(self) -> int | None:
        """How many tokens there are to calibrate on, padding aside; None of images."""
        counts = [_tokens(batch) for batch in self.batches()]
        return None if None in counts else sum(count for count in counts if count is not None)

    def batches(self, *, limit: int | None = None) -> Iterator[EncodedBatch]:
        """What is calibrated on, the same in every pass. Raises BadInput for what cannot be encoded."""
        yield from self._encoded(self.seen[: None if limit is None else limit * CALIBRATION_BATCH])

    def held_out(self) -> list[EncodedBatch]:
        return list(self._encoded(self.kept))

    def general(self) -> list[EncodedBatch]:
        """Text of other kinds; nothing where the examples are no texts."""
        if not isinstance(self.seen[0].content, str):
            return []
        return list(self._encoded([Example(text, None, "text of other kinds") for text in GENERAL_TEXT]))

    def _encoded(self, examples: Sequence[Example]) -> Iterator[EncodedBatch]:
        for begin in range(0, len(examples), CALIBRATION_BATCH):
            yield EncodedBatch(self.encoder.encode(examples[begin : begin + CALIBRATION_BATCH]))


def _tokens(batch: EncodedBatch) -> int | None:
    mask, ids = batch.inputs.get("attention_mask"), batch.inputs.get("input_ids")
    if ids is None:
        return None
    return int(mask.sum()) if mask is not None else ids.numel()


@dataclass(frozen=True)
class Approximation:
    """How far a network of polynomials is from the original on some data.

    ``output_error``: of its first output (logits, or hidden states), relative in the Frobenius norm. ``outside``: share
    of activations that the guard acted on, by feed-forward.
    """

    output_error: float
    outside: Mapping[str, float]

    @property
    def mean_outside(self) -> float:
        return sum(self.outside.values()) / len(self.outside)

    def to_json(self) -> dict[str, Any]:
        return {
            "output_error": self.output_error,
            "outside_largest": max(self.outside.values()),
            "outside_mean": self.mean_outside,
        }


@dataclass(frozen=True)
class Judgement:
    """What a network of polynomials does on data it was calibrated on, on data held out (None where there was too
    little), and on text of other kinds (None where it reads no texts)."""

    examples: int
    tokens: int | None
    in_sample: Approximation
    held_out: Approximation | None
    general: Approximation | None

    def require_bearable(self, method: str) -> None:
        """Raises NotEquivalent where the network computes something else on data that was held out."""
        if self.held_out is not None and not self.held_out.output_error <= LARGEST_ERROR:
            raise NotEquivalent(
                f"{method}: on held-out data the outputs are off by {self.held_out.output_error:.2f} relative, more "
                f"than {LARGEST_ERROR}: this is another network, so that nothing was written; calibrate on more data, "
                "of every kind that the model is used for, or with a higher order."
            )

    def warnings(self) -> tuple[str, ...]:
        """What the owner may not overlook."""
        found = []
        if self.held_out is None:
            found.append(
                f"Warning: {self.examples} examples are too few to hold any out: how it does on others is unknown."
            )
        elif not self.held_out.output_error <= NOTICEABLE_ERROR:
            found.append(
                f"Warning: on held-out data the outputs are off by {self.held_out.output_error:.1%}: the release is "
                "worse than the expert; calibrate on more data, or with a higher order."
            )
        if self.tokens is not None and self.tokens < FEW_TOKENS:
            found.append(f"Warning: it was calibrated on {self.tokens} tokens only; give more data.")
        if self.general is not None and self.general.mean_outside > NOTICEABLE_OUTSIDE:
            found.append(
                f"Warning: on text of other kinds {self.general.mean_outside:.0%} of the activations lie outside the "
                f"calibrated ranges, and the outputs are off by {self.general.output_error:.1%}: it is for use on data "
                "like its calibration's only."
            )
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.in_sample.to_json(),
            "examples": self.examples,
            "tokens": self.tokens,
            "held_out": None if self.held_out is None else self.held_out.to_json(),
            "general_text": None if self.general is None else self.general.to_json(),
        }

    def lines(self) -> list[str]:
        of = "" if self.tokens is None else f" of {self.tokens} tokens"
        lines = [f"Calibrated on {self.examples} examples{of}"]
        for what, found in (
            ("data that was held out", self.held_out),
            ("data it was calibrated on", self.in_sample),
            ("text of other kinds", self.general),
        ):
            if found is not None:
                lines.append(
                    f"Error of the network's output on {what}: {found.output_error:.1e} relative; outside the "
                    f"calibrated ranges {found.mean_outside:.2%} of activations, {max(found.outside.values()):.2%} in "
                    "one layer"
                )
        return lines


def approximation_or_none(original: Any, polynomials: Any, batches: Sequence[EncodedBatch]) -> Approximation | None:
    """As :func:`approximation`; None where there are no batches."""
    return approximation(original, polynomials, batches) if batches else None


@torch.no_grad()
def approximation(original: Any, polynomials: Any, batches: Iterable[EncodedBatch]) -> Approximation:
    """Run both networks on the same batches; padding does not count."""
    # The module that is copied beside the weights. It imports transformers, which most commands do without.
    modeling = importlib.import_module("unmergeable.polynomials.modeling_polynomial")
    apart = whole = 0.0
    with modeling.guard_counted(polynomials) as counts:
        for batch in batches:
            moved = batch.to(device_of(original))
            measured, expected = _output(polynomials, moved), _output(original, moved)
            apart += float((measured - expected).norm()) ** 2
            whole += float(expected.norm()) ** 2
    outside = {name: acted / max(1, seen) for name, (acted, seen) in counts.items()}
    return Approximation((apart / whole) ** 0.5, outside)


def _output(network: Any, batch: EncodedBatch) -> Tensor:
    return batch.visible(network(**batch.inputs)[0]).to(torch.float64)
