"""The arithmetic of the shield: mixtures, scores, units and the weights that are released. No files, no networks.

Names and formulas are those of :mod:`.method`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput
from unmergeable.quantile import DIGITS, KthLargest, magnitude_bits
from unmergeable.randomness import Stream

if TYPE_CHECKING:
    from unmergeable.protections.sensitivity_shield.method import SensitivityShield

PIECE_ELEMENTS = 1 << 21
"""Numbers of a tensor worked on at a time: 16 MB in float64. Random exclusion is drawn piece by piece."""


@dataclass(frozen=True)
class InputNorms:
    """||x_j|| over all inputs of a linear layer, float64 [inputs]. ``axis`` of its weight meets the inputs."""

    axis: int
    norms: Tensor


@dataclass(frozen=True)
class Sensitivity:
    """What makes a weight of one matrix sensitive: a score of its row's threshold or more, in every model.

    ``norms`` float64 [inputs] and ``thresholds`` float64 [rows, 1] of theta_G, and of G1.
    """

    norms: tuple[Tensor, ...]
    thresholds: tuple[Tensor, ...]


@dataclass(frozen=True)
class Rows:
    """One tensor of all checkpoints, whole and as stored, each [rows, inputs].

    ``siblings`` are those mixed in by ``shares``. ``perturber`` makes G1 of theta_G; None where there is no G1.
    """

    expert: Tensor
    base: Tensor
    siblings: tuple[Tensor, ...]
    shares: tuple[float, ...]
    perturber: Tensor | None
    perturbation: float

    def windows(self) -> Iterator[slice]:
        """Rows to work on at a time."""
        rows, inputs = self.expert.shape
        step = max(1, PIECE_ELEMENTS // max(1, inputs))
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def mixture(self, window: slice) -> Tensor:
        """theta_G, float64."""
        start = self.expert[window].double()
        mixed = start.clone()
        for sibling, share in zip(self.siblings, self.shares, strict=True):
            mixed += share * (sibling[window].double() - start)
        return mixed

    def perturbed(self, window: slice, mixture: Tensor) -> Tensor:
        """G1, float64."""
        assert self.perturber is not None
        return mixture + self.perturbation * (self.perturber[window].double() - self.base[window].double())

    def models(self, window: slice, mixture: Tensor, count: int) -> list[Tensor]:
        """theta_G, and G1 where two are asked for."""
        return [mixture, self.perturbed(window, mixture)][:count] if count > 1 else [mixture][:count]

    def sensitivity(self, norms: Sequence[Tensor], top_share: float) -> Sensitivity:
        """Wanda's thresholds: the score of the last weight in the top share of each row."""
        thresholds: list[list[Tensor]] = [[] for _ in norms]
        inputs = self.expert.shape[1]
        kept = max(1, math.floor(_fraction(top_share) * inputs))
        for window in self.windows():
            models = self.models(window, self.mixture(window), len(norms))
            for found, model, input_norms in zip(thresholds, models, norms, strict=True):
                found.append((model.abs() * input_norms).kthvalue(inputs - kept + 1, dim=1, keepdim=True).values)
        return Sensitivity(tuple(norms), tuple(torch.cat(pieces) for pieces in thresholds))

    def is_sensitive(self, window: slice, mixture: Tensor, by: Sensitivity) -> Tensor:
        """S, bool [rows of the window, inputs]."""
        inside = torch.ones_like(mixture, dtype=torch.bool)
        models = self.models(window, mixture, len(by.norms))
        for model, norms, thresholds in zip(models, by.norms, by.thresholds, strict=True):
            inside &= model.abs() * norms >= thresholds[window]
        return inside


@dataclass(frozen=True)
class Shield:
    """The checkpoints of a shield and what decides about their weights.

    Attributes:
        settings, expert, base, siblings: as given.
        mixed: tensors that all hold in one shape; the others stay the expert's.
        ranked: those of them that the local part changes.
        input_norms: per matrix those of theta_G, and of G1.
        stream: of ``exclusion=random``.
    """

    settings: SensitivityShield
    expert: TensorSource
    base: TensorSource
    siblings: tuple[TensorSource, ...]
    mixed: frozenset[str]
    ranked: tuple[str, ...]
    stream: Stream
    input_norms: Mapping[str, tuple[InputNorms, ...]] = field(default_factory=dict)

    def scored_by(self, norms: Mapping[str, tuple[InputNorms, ...]]) -> Shield:
        """With scores. Matrices that have none are not ranked: whether they are sensitive is not known.

        Raises:
            BadInput: none has one.
        """
        ranked = self.ranked
        if self.settings.tensors == "matrices":
            ranked = tuple(name for name in ranked if name in norms)
            if not ranked:
                raise BadInput(
                    f"sensitivity_shield: no matrix of {self.expert.description} is a linear layer of the network, "
                    "which scores are for; set exclusion=random or none."
                )
        return replace(self, ranked=ranked, input_norms=norms)

    def rows(self, name: str, expert: Tensor | None = None) -> Rows:
        """The tensor of all checkpoints, as views of [rows, inputs]; ``expert`` where it has been read already.

        What has no score is one column.
        """
        settings = self.settings
        norms = self.input_norms.get(name)

        def as_rows(tensor: Tensor) -> Tensor:
            if norms is None:
                return tensor.reshape(-1, 1)
            return tensor if norms[0].axis == 1 else tensor.T

        shares = settings.mixed_shares
        siblings = tuple(as_rows(sibling.tensor(name)) for sibling in self.siblings[: len(shares)])
        perturber = None
        if settings.scored_models > 1:
            perturber = siblings[0] if siblings else as_rows(self.siblings[0].tensor(name))
        return Rows(
            as_rows(self.expert.tensor(name) if expert is None else expert),
            as_rows(self.base.tensor(name)),
            siblings,
            shares,
            perturber,
            settings.perturbation,
        )

    def model(self, name: str, *, is_perturbed: bool) -> Tensor:
        """One tensor of theta_G or G1, float32 in its stored shape: what a live network is given."""
        rows = self.rows(name)
        filled = torch.empty(rows.expert.shape, dtype=torch.float32)
        for window in rows.windows():
            mixture = rows.mixture(window)
            filled[window] = rows.perturbed(window, mixture) if is_perturbed else mixture
        return filled.reshape(self.expert.spec(name).shape)

    def sensitivity(self, name: str, rows: Rows) -> Sensitivity | None:
        """Of a tensor that has a score."""
        norms = self.input_norms.get(name)
        return None if norms is None else rows.sensitivity([layer.norms for layer in norms], self.settings.top_share)

    def is_excluded(
        self, name: str, rows: Rows, window: slice, mixture: Tensor, by: Sensitivity | None
    ) -> Tensor | None:
        """The weights that stay theta_G, bool; None for none of them."""
        if by is not None:
            return rows.is_sensitive(window, mixture, by)
        if self.settings.exclusion == "random":
            stream = self.stream.child(name).child(str(window.start))
            drawn = stream.uniform(mixture.numel()) < self.settings.random_share
            return torch.from_numpy(drawn).reshape(mixture.shape)
        return None

    def magnitudes(self, name: str, rows: Rows, by: Sensitivity | None) -> Iterator[Tensor]:
        """|tau_G| of the weights that are ranked, float32 [weights], a piece at a time."""
        for window in rows.windows():
            mixture = rows.mixture(window)
            excluded = self.is_excluded(name, rows, window, mixture, by)
            magnitudes = task_vector_magnitudes(mixture, rows.base[window])
            yield magnitudes.reshape(-1) if excluded is None else magnitudes[~excluded]

    def release_(self, name: str, tensor: Tensor, by: Sensitivity | None, boundaries: Tensor) -> Tensor:
        """Overwrite the expert's ``tensor`` with the one to release, rounded once, and return it.

        ``boundaries``: smallest magnitude of each unit but the last, float32, ascending.

        Raises:
            BadInput: a checkpoint holds NaN or infinity, or the result has no place in the stored dtype.
        """
        rows = self.rows(name, tensor)
        is_ranked = name in self.ranked
        for window in rows.windows():
            released = mixture = rows.mixture(window)
            if is_ranked:
                start = rows.base[window].double()
                is_odd = unit_numbers(task_vector_magnitudes(mixture, rows.base[window]), boundaries) % 2 == 1
                released = torch.where(is_odd, start, 2 * mixture - start)
                excluded = self.is_excluded(name, rows, window, mixture, by)
                if excluded is not None:
                    released = torch.where(excluded, mixture, released)
            rows.expert[window] = released.to(tensor.dtype)
            if not bool(rows.expert[window].isfinite().all()):
                raise BadInput(
                    f"sensitivity_shield: tensor {name} would hold NaN or infinity; get undamaged copies of "
                    f"{self.expert.description}, the base and the siblings."
                )
        return tensor


@dataclass(frozen=True)
class Boundaries:
    """A search for many exact magnitudes at once: all that share their first 16 bits are refined by one count."""

    searches: tuple[KthLargest, ...]

    @classmethod
    def after_first_pass(cls, counts: Tensor, unit: float) -> Boundaries:
        """The magnitudes that end a unit, given how often each first digit occurs, int64 [2^16]."""
        ranks = unit_ends(int(counts.sum()), unit)
        return cls(tuple(KthLargest(rank).narrow(counts) for rank in ranks))

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The first digits that are looked into."""
        return tuple(sorted({search.prefix for search in self.searches}))

    def zero_counts(self) -> Tensor:
        """What :meth:`count` adds up to: int64 [prefixes, 2^16]."""
        return torch.zeros(len(self.prefixes), DIGITS, dtype=torch.int64)

    def count(self, values: Tensor) -> Tensor:
        """How often each second digit follows each prefix among float32 ``values``."""
        prefixes = self.prefixes
        row_of = torch.full((DIGITS,), -1, dtype=torch.int64)
        row_of[list(prefixes)] = torch.arange(len(prefixes))
        keys = magnitude_bits(values).long()
        rows = row_of[keys >> 16]
        is_inside = rows >= 0
        cells = rows[is_inside] * DIGITS + (keys[is_inside] & (DIGITS - 1))
        return torch.bincount(cells, minlength=len(prefixes) * DIGITS).reshape(-1, DIGITS)

    def settled(self, counts: Tensor) -> Tensor:
        """The magnitudes, float32, ascending, after a second pass."""
        row_of = {prefix: row for row, prefix in enumerate(self.prefixes)}
        values = [search.narrow(counts[row_of[search.prefix]]).value for search in self.searches]
        return torch.tensor(sorted(values), dtype=torch.float32)


def first_digits(values: Tensor) -> Tensor:
    """How often each first digit occurs among magnitudes: int64 [2^16]."""
    return KthLargest(1).count(values)


def unit_ends(count: int, unit: float) -> list[int]:
    """How many of ``count`` weights lie in the first unit, the first two, and so on, but for all of them.

    Of fewer weights than units, each is a unit.
    """
    share = _fraction(unit)
    ends = {math.floor(number * share * count) for number in range(1, math.ceil(1 / share))}
    return sorted(ends - {0})


def task_vector_magnitudes(mixture: Tensor, base: Tensor) -> Tensor:
    """|tau_G|, rounded to float32: what weights are ranked by."""
    return (mixture - base.double()).abs().float()


def unit_numbers(magnitudes: Tensor, boundaries: Tensor) -> Tensor:
    """1 for the unit of the largest magnitudes; all that reach a unit's smallest are in it. int64, any shape."""
    return 1 + len(boundaries) - torch.searchsorted(boundaries, magnitudes.contiguous(), right=True)


def _fraction(share: float) -> Fraction:
    """The decimal that was written: 0.02 of 150 is 3, and not a little less."""
    return Fraction(str(share))
