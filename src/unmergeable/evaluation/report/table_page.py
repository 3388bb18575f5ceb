"""A table as Markdown: averages first, then every merge, in per cent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from unmergeable.evaluation.plans.table_plan import UNPROTECTED, merged
from unmergeable.evaluation.table_results import Alone, Average, MeanRecord, ModelScores, Scores, TableCell, TableResult

MATRIX_FROM = 3
"""With fewer experts, pairs are written as rows."""

Item = TypeVar("Item")


def page(result: TableResult) -> str:
    lines = [f"# {result.title}", "", f"{result.source}.", ""]
    lines += [
        "Scores in per cent of the test examples of the victim's task, ± standard error. Difference: to the same "
        "merges of the unprotected expert. Drop ratio: (expert − merged) / (expert − base), as published: 0 is the "
        "expert's own score, 1 that of the base.",
        "",
        *_averages(result),
        *_published(result),
        *_alone(result),
    ]
    for merge in _ordered(average.merge for average in result.averages):
        for size in _ordered(average.partners for average in result.averages):
            chosen = [a for a in result.averages if (a.merge, a.partners) == (merge, size)]
            lines += _matrices(result, chosen) if _is_matrix(result, size) else _rows(result, chosen)
    return "\n".join([*lines, *_refusals(result)]).rstrip() + "\n"


def summary(result: TableResult) -> list[str]:
    """One line for each average."""
    lines = []
    for average in result.averages:
        if average.mean is None:
            lines.append(f"{average.label}: refused")
            continue
        gap = average.difference
        beside = "" if gap is None else f", {_signed(gap.mean)} points to {UNPROTECTED}"
        lines.append(f"{average.label}: {_percent(average.mean)} %{beside}")
    return lines


def _averages(result: TableResult) -> list[str]:
    """A line for each that merges; an average over some of its merges only says how many were refused."""
    rows = [
        [
            average.merge,
            merged(average.partners),
            average.variant + (f" ({average.refused} refused)" if average.refused else ""),
            _with_error(average),
            "" if average.difference is None else _with_error(average.difference, signed=True),
            "" if average.drop_ratio is None else f"{average.drop_ratio:.2f}",
            _percent(average.partners_mean),
        ]
        for average in result.averages
        if average.mean is not None
    ]
    head = ["merge", "merged", "variant", "victim's task", "difference", "drop ratio", "partners' tasks"]
    never = [
        variant
        for variant in _ordered(average.variant for average in result.averages)
        if all(average.mean is None for average in result.averages if average.variant == variant)
    ]
    return ["## Averages", "", *_table(head, rows), *([f"Never merged: {'; '.join(never)}.", ""] if never else [])]


def _published(result: TableResult) -> list[str]:
    """The paper's figures beside ours; its own are written as the plan has them."""
    if not result.published:
        return []
    rows = []
    for label, value in result.published.items():
        ours = result.figures.get(label)
        here = "refused" if ours is None else _percent(ours)
        rows.append([label, value if isinstance(value, str) else f"{value:g}", here])
    return ["## Published", "", *_table(["figure, %", "published", "here"], rows)]


def _alone(result: TableResult) -> list[str]:
    """Models that are not merged: each on its own task, and victims on tasks of no expert."""
    alone = result.alone
    tasks = {expert["name"]: expert["task"] for expert in result.plan["experts"]}
    lines = ["## Alone", "", *_alone_on(alone, alone.base, tasks)]
    elsewhere = alone.elsewhere or {}
    if elsewhere:
        lines += ["What the victims score on tasks that no expert was tuned for:", ""]
    for task, there in elsewhere.items():
        lines += _alone_on(there, alone.base, dict.fromkeys(there.experts, task))
    return lines


def _alone_on(models: Alone | ModelScores, base: Scores, tasks: Mapping[str, str]) -> list[str]:
    rows = [
        [
            expert,
            tasks[expert],
            _percent(base[tasks[expert]]),
            _percent(score),
            *(_percent(scores.get(expert)) for scores in models.protected.values()),
        ]
        for expert, score in models.experts.items()
    ]
    return _table(["expert", "task", "base", UNPROTECTED, *models.protected], rows)


def _is_matrix(result: TableResult, size: int) -> bool:
    return size == 1 and len(result.alone.experts) >= MATRIX_FROM


def _matrices(result: TableResult, averages: Sequence[Average]) -> list[str]:
    partners = list(result.alone.experts)
    lines = [
        f"## {averages[0].merge}, pairs",
        "",
        "Rows: the victim, scored on its own task. Columns: its partner.",
        "",
    ]
    for average in averages:
        if average.mean is None:
            continue
        lines += [f"**{average.variant}**", ""]
        cells = {
            (cell.victim, cell.partners[0]): cell for cell in _cells_of(result, average) if cell.scores is not None
        }
        rows = []
        for victim in _ordered(victim for victim, _ in cells):
            own = [
                _percent(_own_score(result, cells[victim, name])) if (victim, name) in cells else ""
                for name in partners
            ]
            rows.append([victim, *own, *_end_of_row(average, victim)])
        has_gaps = bool(average.row_differences)
        lines += _table(["", *partners, "average", *(["difference"] if has_gaps else [])], rows)
    return [*lines, *_refused(averages)]


def _refused(averages: Sequence[Average]) -> list[str]:
    """The variants that did not merge at all."""
    names = [average.variant for average in averages if average.mean is None]
    return [f"Refused: {'; '.join(names)}.", ""] if names else []


def _end_of_row(average: Average, victim: str) -> list[str]:
    ends = [_with_error(average.rows[victim])]
    if average.row_differences:
        gap = average.row_differences.get(victim)
        ends.append("" if gap is None else _with_error(gap, signed=True))
    return ends


def _rows(result: TableResult, averages: Sequence[Average]) -> list[str]:
    places: dict[tuple[str, ...], dict[str, str]] = {}
    for average in averages:
        for cell in _cells_of(result, average):
            score = _percent(_own_score(result, cell)) if cell.scores is not None else "refused"
            places.setdefault((cell.victim, *cell.partners), {})[average.variant] = score
    variants = [average.variant for average in averages if average.mean is not None]
    rows = [
        [victim, ", ".join(partners), *(scores[name] for name in variants)]
        for (victim, *partners), scores in places.items()
    ]
    title = f"## {averages[0].merge}, {merged(averages[0].partners)}"
    return [title, "", *_table(["victim", "merged with", *variants], rows), *_refused(averages)]


def _cells_of(result: TableResult, average: Average) -> list[TableCell]:
    return [
        cell
        for cell in result.cells
        if (cell.variant, cell.merge, len(cell.partners)) == (average.variant, average.merge, average.partners)
    ]


def _own_score(result: TableResult, cell: TableCell) -> float | None:
    tasks = {expert["name"]: expert["task"] for expert in result.plan["experts"]}
    return (cell.scores or {}).get(tasks[cell.victim])


def _refusals(result: TableResult) -> list[str]:
    """How many merges of each variant, and the reason of the first."""
    reasons: dict[str, list[str]] = {}
    for cell in result.cells:
        if cell.refused is not None:
            reasons.setdefault(cell.variant, []).append(cell.refused)
    if not reasons:
        return []
    rows = [[variant, str(len(same)), same[0]] for variant, same in reasons.items()]
    return ["## Refused", "", *_table(["variant", "merges", "reason of the first"], rows)]


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows]
    return [*lines, ""]


def _ordered(values: Iterable[Item]) -> list[Item]:
    return list(dict.fromkeys(values))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _with_error(mean: MeanRecord | Average, *, signed: bool = False) -> str:
    text = _signed(mean.mean) if signed and mean.mean is not None else _percent(mean.mean)
    return text if mean.standard_error is None else f"{text} ± {_percent(mean.standard_error)}"
