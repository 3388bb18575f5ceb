"""Parts never overlap, orders repeat, and only what is asked for is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmergeable.data import DataSource, Example
from unmergeable.data.source import PARTS, part_of
from unmergeable.errors import BadInput, UsageError

COUNT = 400


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Every tenth text is there twice, with another label."""
    rows = [{"text": f"text number {n - (n % 10 == 9)}", "label": n} for n in range(COUNT)]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def labels(source: DataSource) -> list[object]:
    return [example.label for example in source]


def test_without_a_seed_the_order_is_the_files(path: Path) -> None:
    assert labels(DataSource(path)) == list(range(COUNT))
    assert labels(DataSource(path, limit=3)) == [0, 1, 2]


def test_a_seed_decides_the_order(path: Path) -> None:
    first, again, other = (labels(DataSource(path, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert sorted(map(str, first)) == sorted(map(str, range(COUNT)))
    assert first != other != labels(DataSource(path))
    assert labels(DataSource(path, seed=0, limit=5)) == first[:5]
    source = DataSource(path, seed=0)
    assert labels(source) == labels(source)  # a source may be read again


def test_parts_hold_everything_once_and_share_no_text(path: Path) -> None:
    found = {part: list(DataSource(path, part=part, seed=number)) for number, part in enumerate(PARTS)}
    everything = [example.label for part in found.values() for example in part]
    assert sorted(map(str, everything)) == sorted(map(str, range(COUNT)))
    texts = [{example.content for example in part} for part in found.values()]
    assert not texts[0] & texts[1] | texts[1] & texts[2] | texts[0] & texts[2]
    # Control: there are copies to be kept together.
    assert sum(map(len, texts)) == COUNT - COUNT // 10
    # 360 texts, each in train with probability 0.8: five standard deviations are 38.
    assert abs(len(texts[0]) - 0.8 * 360) < 38


def test_added_examples_move_none(path: Path) -> None:
    before = {example.content for example in DataSource(path, part="test")}
    path.write_text(json.dumps({"text": "new"}) + "\n" + path.read_text())
    after = {example.content for example in DataSource(path, part="test")}
    assert before <= after <= before | {"new"}


def test_nothing_behind_the_limit_is_read(path: Path) -> None:
    path.write_text(path.read_text() + "\nnot JSON\n")
    assert len(list(DataSource(path, limit=COUNT))) == COUNT
    with pytest.raises(BadInput, match=f"x.jsonl:{COUNT + 1}: not JSON"):
        list(DataSource(path))


@given(st.text(), st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (0.0, 0.0, 1.0), (1 / 3, 1 / 3, 1 / 3)]))
@settings(max_examples=50, deadline=None)
def test_every_example_has_a_part_of_positive_size(text: str, fractions: tuple[float, float, float]) -> None:
    part = part_of(Example(text, None, "x"), fractions)
    assert fractions[PARTS.index(part)] > 0
    assert part == part_of(Example(text, 3, "elsewhere"), fractions)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"format": "csv"}, r"no format of data is called 'csv'; known: jsonl, text"),
        ({"part": "dev"}, r"no part of data is called 'dev'; known: train, validation, test"),
        ({"limit": 0}, r"limit=0: at least one"),
        ({"fractions": (0.9, 0.2, 0.0)}, r"fractions=.*must add up to 1"),
        ({"fractions": (1.1, -0.1, 0.0)}, r"fractions=.*must not be negative"),
    ],
)
def test_refuses_settings(path: Path, setting: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(DataSource(path, **setting))  # type: ignore[arg-type]


def test_an_empty_part_is_named(path: Path) -> None:
    with pytest.raises(BadInput, match=r"no examples in its test part"):
        list(DataSource(path, part="test", fractions=(1.0, 0.0, 0.0)))
