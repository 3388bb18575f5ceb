"""Published claims, checked by code: what was published, what is found here, and whether the claim holds here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.real_experts.scoring import Difference, Right

Verdict = Literal["yes", "no", "undecided"]
"""Undecided: the difference is below two standard errors."""


@dataclass(frozen=True)
class Claim:
    """``claim`` in words; figures as ``published`` and as found here (``ours``)."""

    claim: str
    published: str
    ours: str
    holds: Verdict

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def below(claim: str, published: str, lower: tuple[str, Right], higher: tuple[str, Right]) -> Claim:
    """That one model does worse than another on the same examples."""
    gap = Difference.between(lower[1], higher[1])
    holds: Verdict = "undecided" if not gap.is_real else "yes" if gap.points > 0 else "no"
    return Claim(claim, published, _both(lower, higher, gap), holds)


def not_above(claim: str, published: str, lower: tuple[str, Right], higher: tuple[str, Right]) -> Claim:
    """That one model does no better than another on the same examples."""
    gap = Difference.between(lower[1], higher[1])
    holds: Verdict = "no" if gap.is_real and gap.points < 0 else "yes"
    return Claim(claim, published, _both(lower, higher, gap), holds)


def _both(lower: tuple[str, Right], higher: tuple[str, Right], gap: Difference) -> str:
    sides = ", ".join(f"{name} {percent(right)}" for name, right in (lower, higher))
    return f"{sides} ({gap.points:+.1f} ± {gap.standard_error:.1f})"


def stays_below(claim: str, published: str, lower: tuple[str, Right], higher: tuple[str, Right]) -> Claim:
    """That one model does worse than another: no unless it is seen."""
    gap = Difference.between(lower[1], higher[1])
    return Claim(claim, published, _both(lower, higher, gap), "yes" if gap.is_real and gap.points > 0 else "no")


def loss_at_most(claim: str, published: str, bound: float, before: Right, after: Right) -> Claim:
    """That a model loses at most so many points against another."""
    return Claim(claim, published, *_bounded(Difference.between(after, before), bound, before, after))


def gain_at_most(claim: str, published: str, bound: float, before: Right, after: Right) -> Claim:
    """That a model gains at most so many points on another."""
    return Claim(claim, published, *_bounded(Difference.between(before, after), bound, before, after))


def _bounded(change: Difference, bound: float, before: Right, after: Right) -> tuple[str, Verdict]:
    holds: Verdict = "yes" if change.points <= bound else "undecided"
    if change.points - 2 * change.standard_error > bound:
        holds = "no"
    return f"{percent(before)} to {percent(after)} (± {change.standard_error:.1f})", holds


def percent(right: Right) -> str:
    """Accuracy in per cent."""
    return f"{100 * right.mean():.1f}"


def claims_table(claims: Sequence[Claim]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| claim | published | here | holds |", "|---|---|---|---|"]
    return lines + [f"| {claim.claim} | {claim.published} | {claim.ours} | {claim.holds} |" for claim in claims]
