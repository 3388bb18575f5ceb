"""D* once more, from the credits that a result keeps: somebody else's audit is checked without its models.

result = read_audit(Path("vision_audit.json"))
for found in recomputed(result):
    print(found.protection, found.model, found.trial.rider, found.trial.seed, found.d_star, found.area)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from unmergeable.errors import BadInput
from unmergeable.evaluation.names import IDENTITY
from unmergeable.evaluation.packing import unpack
from unmergeable.evaluation.results import AuditResult, CellRecord, Trial
from unmergeable.evaluation.selection import KEPT_SHARE, Floats, Menu
from unmergeable.evaluation.threat_models import ThreatModel
from unmergeable.evaluation.worst_case import WorstCase, judged


@dataclass(frozen=True)
class Recomputed:
    """A trial of a protection, and from credits D* at each of its shares of kept skill, and between fronts."""

    protection: str
    model: ThreatModel
    trial: Trial
    at_bars: tuple[WorstCase, ...]
    area: float

    @property
    def d_star(self) -> float:
        """D* at the usual share of kept skill."""
        return next(found.d_star for found in self.at_bars if found.kept_share == KEPT_SHARE)


def recomputed(result: AuditResult) -> Iterator[Recomputed]:
    """Every trial of every protection, anew.

    Raises:
        BadInput: the result was stored without credits, or these are damaged.
    """
    contests = {rider: _Contest.of(result, rider, parts) for rider, parts in (result.riders or {}).items()}
    if not contests:
        raise BadInput("this result was stored without credits, from which D* could be computed again; run the audit.")
    for name, protection in result.protections.items():
        for model, verdicts in protection.tiers.items():
            for trial in verdicts.trials:
                contest = contests[trial.rider]
                owners = ((IDENTITY, 0), (name, trial.seed), None)
                unprotected, protected, without = (contest.menu_of(owner, model, trial.samples) for owner in owners)
                bars = tuple(bar.kept_share for bar in trial.bars) or (KEPT_SHARE,)
                alone = contest.rider_alone
                found, area = judged(unprotected, protected, without, alone, bars, is_merging=model.merges)
                yield Recomputed(name, model, trial, found, area)


@dataclass(frozen=True)
class _Contest:
    """The attacks on behalf of one free-rider, in the order in which they were tried."""

    rider_alone: Floats
    cells: tuple[CellRecord, ...]
    menu: Menu

    @classmethod
    def of(cls, result: AuditResult, rider: str, parts: Mapping[str, str]) -> _Contest:
        found = [(cell, cell.credits) for cell in result.cells or () if cell.rider == rider and cell.credits]
        if not found:
            raise BadInput(f"this result has no credits of attacks on behalf of {rider}; run the audit again.")
        (own,) = set(found[0][1]["validation"]) - {result.task}
        places = (("validation", result.task), ("validation", own), ("test", result.task))
        try:
            columns = [np.array([unpack(packed[part][task]) for _, packed in found]) for part, task in places]
        except (KeyError, ValueError):
            raise BadInput(
                f"the credits of attacks on behalf of {rider} are incomplete; run the audit again."
            ) from None
        return cls(unpack(parts["validation"]), tuple(cell for cell, _ in found), Menu(*columns))

    def menu_of(self, owner: tuple[str, int] | None, model: ThreatModel, samples: int | None) -> Menu:
        """What an attacker with so many labelled examples may do to a protected model; None: without the victim.

        Where nobody can merge a release in any form, whoever holds it can run it.
        """
        numbers = self._open_to(owner, model, samples)
        if not numbers and owner is not None and model.includes(ThreatModel.WHITE_BOX):
            numbers = self._open_to(owner, ThreatModel.BLACK_BOX, None)
        return self.menu.only(numbers)

    def _open_to(self, owner: tuple[str, int] | None, model: ThreatModel, samples: int | None) -> list[int]:
        return [
            number
            for number, cell in enumerate(self.cells)
            if (None if cell.protection is None else (cell.protection, cell.seed)) == owner
            and cell.attack.samples in (None, samples)
            and model.may(cell.tier, with_victim=owner is not None)
        ]
