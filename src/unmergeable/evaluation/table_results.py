"""The result of a table, typed: what stands in ``table.json``. docs/tables.md explains every entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unmergeable.evaluation.records import OPTIONAL, Record

Scores = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class MeanRecord(Record):
    """A share of right answers; the standard error is None where there is a single example."""

    mean: float
    standard_error: float | None


@dataclass(frozen=True, kw_only=True)
class ModelScores(Record):
    """Scores of models that are not merged: experts by name, releases by protection and victim."""

    experts: Scores
    protected: Mapping[str, Scores]


@dataclass(frozen=True, kw_only=True)
class Alone(Record):
    """Models that are not merged: the base on every task, the others on their own and, by task, ``elsewhere``."""

    base: Scores
    experts: Scores
    protected: Mapping[str, Scores]
    elsewhere: Mapping[str, ModelScores] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class Average(Record):
    """One variant with one merge, over all victims and groups of so many partners.

    ``rows``: by victim. ``difference``: to the unprotected expert, paired by example. ``refused``: how many groups.
    """

    label: str
    variant: str
    protection: str | None
    recovery: str | None
    merge: str
    partners: int
    mean: float | None
    standard_error: float | None
    rows: Mapping[str, MeanRecord]
    difference: MeanRecord | None
    row_differences: Mapping[str, MeanRecord]
    drop_ratio: float | None
    partners_mean: float | None
    refused: int


@dataclass(frozen=True, kw_only=True)
class TableCell(Record):
    """One merge: ``scores`` by task, or why it was ``refused``.

    ``coefficient`` is the one that was chosen, where the plan gives several.
    """

    victim: str
    variant: str
    partners: tuple[str, ...]
    merge: str
    refused: str | None = field(default=None, metadata=OPTIONAL)
    coefficient: float | None = field(default=None, metadata=OPTIONAL)
    scores: Scores | None = field(default=None, metadata=OPTIONAL)
    cpu_seconds: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class TableResult(Record):
    """A table. ``figures`` by label, as shares; ``published`` as the plan has them."""

    title: str
    source: str
    plan: Mapping[str, Any]
    environment: Mapping[str, Any]
    digests: Mapping[str, str]
    tasks: Mapping[str, Mapping[str, Any]]
    alone: Alone
    averages: tuple[Average, ...]
    figures: Scores
    published: Mapping[str, float | str]
    cells: tuple[TableCell, ...]
