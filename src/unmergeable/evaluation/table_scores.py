"""The figures of a table: averages over victims and groups, with their standard errors.

A row is one victim: the mean over the groups it is merged with, example by example, so that its standard error is that
of a mean of examples, which the groups share. Rows of different tasks are independent; rows of one task share its
examples and are added before the error is taken. A difference to the unprotected expert is taken example by example.

    DropRatio = (expert - merged) / (expert - base)        on the averages over all rows
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unmergeable.evaluation.cells import Cell, Credits
from unmergeable.evaluation.plans.entries import MergeEntry
from unmergeable.evaluation.plans.table_plan import TablePlan, VariantName
from unmergeable.evaluation.table_results import Alone, Average, MeanRecord, Scores


@dataclass(frozen=True)
class Place:
    """Where a cell stands in the table."""

    victim: str
    variant: VariantName
    partners: tuple[str, ...]
    merge: str


Cells = Mapping[Place, Cell | str]
"""What stands there: a cell, or why there is none."""


@dataclass(frozen=True)
class Mean:
    """A share of right answers with its standard error; NaN where there is a single example."""

    value: float
    error: float

    @classmethod
    def over(cls, rows: Sequence[tuple[str, Credits]]) -> Mean:
        """Of rows, each the name of a task and a credit for each of its examples."""
        by_task: dict[str, Credits] = {}
        for task, row in rows:
            by_task[task] = by_task.get(task, np.zeros(1)) + row / len(rows)
        variance = sum(float(row.var(ddof=1)) / len(row) if len(row) > 1 else math.nan for row in by_task.values())
        return cls(sum(float(row.mean()) for row in by_task.values()), math.sqrt(variance))

    def record(self) -> MeanRecord:
        return MeanRecord(mean=round(self.value, 6), standard_error=rounded(self.error))


def rounded(value: float) -> float | None:
    """To a millionth; None for NaN, which JSON does not have."""
    return None if math.isnan(value) else round(value, 6)


def averages(plan: TablePlan, cells: Cells, alone: Alone) -> list[Average]:
    """Every average of the table, in the order of merges, sizes of groups, variants."""
    return [
        _average(plan, cells, alone, variant, merge, size)
        for merge in plan.merges
        for size in plan.sizes
        for variant in plan.variants
    ]


def _average(
    plan: TablePlan, cells: Cells, alone: Alone, variant: VariantName, merge: MergeEntry, size: int
) -> Average:
    rows: dict[str, Credits] = {}
    gaps: dict[str, Credits] = {}
    others: list[float] = []
    refused = 0
    for victim in plan.victims:
        task = plan.expert(victim).task
        merged, plain, beside = [], [], []
        for partners in (group for group in plan.groups(victim) if len(group) == size):
            cell = cells[Place(victim, variant, partners, merge.name)]
            if not isinstance(cell, Cell):
                refused += 1
                continue
            merged.append(cell.credits[task])
            beside += [float(cell.credits[plan.expert(name).task].mean()) for name in partners]
            unprotected = cells[Place(victim, VariantName(), partners, merge.name)]
            if isinstance(unprotected, Cell):
                plain.append(cell.credits[task] - unprotected.credits[task])
        if merged:
            rows[victim] = np.mean(merged, axis=0)
            others.append(float(np.mean(beside)))
        if plain:
            gaps[victim] = np.mean(plain, axis=0)
    whole = _mean(plan, rows)
    is_compared = variant != VariantName()
    return Average(
        label=plan.label(variant, merge, size),
        variant=str(variant),
        protection=variant.protection,
        recovery=variant.recovery,
        merge=merge.name,
        partners=size,
        mean=None if whole is None else whole.mean,
        standard_error=None if whole is None else whole.standard_error,
        rows=_each(plan, rows),
        difference=_mean(plan, gaps) if is_compared else None,
        row_differences=_each(plan, gaps) if is_compared else {},
        drop_ratio=_drop_ratio(plan, alone, rows),
        partners_mean=rounded(float(np.mean(others))) if others else None,
        refused=refused,
    )


def _mean(plan: TablePlan, rows: Mapping[str, Credits]) -> MeanRecord | None:
    if not rows:
        return None
    return Mean.over([(plan.expert(victim).task, row) for victim, row in rows.items()]).record()


def _each(plan: TablePlan, rows: Mapping[str, Credits]) -> dict[str, MeanRecord]:
    return {victim: Mean.over([(plan.expert(victim).task, row)]).record() for victim, row in rows.items()}


def _drop_ratio(plan: TablePlan, alone: Alone, rows: Mapping[str, Credits]) -> float | None:
    """The published ratio; None where the experts have learnt nothing, or nothing merged."""
    if not rows:
        return None
    base = np.mean([alone.base[plan.expert(victim).task] for victim in rows])
    expert = np.mean([alone.experts[victim] for victim in rows])
    merged = np.mean([row.mean() for row in rows.values()])
    return rounded(float((expert - merged) / (expert - base))) if expert > base else None


def figures(plan: TablePlan, alone: Alone, means: Sequence[Average]) -> dict[str, float | None]:
    """Every figure of the table by its label, as a share."""
    values: dict[str, float | None] = {f"base / {task}": score for task, score in alone.base.items()}
    values |= _by_label(alone.experts, alone.protected)
    for task, there in (alone.elsewhere or {}).items():
        scores = _by_label(there.experts, there.protected)
        values |= {f"{label} / {task}": score for label, score in scores.items()}
    for average in means:
        values[average.label] = average.mean
        values[f"drop ratio / {average.label}"] = average.drop_ratio
        for victim in plan.victims:
            row = average.rows.get(victim)
            values[f"{victim} / {average.label}"] = None if row is None else row.mean
    return values


def _by_label(experts: Scores, protected: Mapping[str, Scores]) -> dict[str, float | None]:
    """What experts and releases score that are not merged."""
    values: dict[str, float | None] = {f"{expert} / alone": score for expert, score in experts.items()}
    for protection, scores in protected.items():
        values |= {f"{victim} / {protection} / alone": score for victim, score in scores.items()}
    return values
