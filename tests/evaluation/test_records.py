"""Results as JSON: the fields in their order, and read back as they were."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from evaluation.documents import document
from unmergeable.errors import BadInput
from unmergeable.evaluation.records import INLINED, OPTIONAL, Record
from unmergeable.evaluation.results import read_audit
from unmergeable.evaluation.threat_models import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Inner(Record):
    value: float | None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer(Record):
    name: str
    note: str | None = field(default=None, metadata=OPTIONAL)
    inner: Inner = field(metadata=INLINED)
    by_model: Mapping[ThreatModel, Inner | None]
    pair: tuple[float, int]


WHOLE = Outer(
    name="a",
    inner=Inner(value=None, texts=("x",)),
    by_model={ThreatModel.WHITE_BOX: Inner(value=0.5), ThreatModel.FEW_SHOT: None},
    pair=(0.25, 3),
)


def test_a_record_is_an_object_with_its_fields() -> None:
    document = WHOLE.to_json()
    assert list(document) == ["name", "value", "texts", "by_model", "pair"], "an optional field is left out"
    assert document["by_model"] == {"T1": {"value": 0.5, "texts": []}, "T2": None}


@pytest.mark.parametrize("note", [None, "said"])
def test_it_is_read_back_as_it_was(note: str | None) -> None:
    record = Outer(**{**vars(WHOLE), "note": note})
    assert Outer.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert ("note" in record.to_json()) == (note is not None)


def test_what_is_missing_is_an_error_and_what_is_more_is_not() -> None:
    document = WHOLE.to_json()
    assert Inner.from_json({"value": 1.0, "more": 2}) == Inner(value=1.0)
    del document["name"]
    with pytest.raises(KeyError, match="name"):
        Outer.from_json(document)


def test_what_is_not_finite_is_null() -> None:
    """JSON has neither NaN nor infinity. A number is read as NaN, what may be missing as missing."""
    record = Outer(**{**vars(WHOLE), "pair": (math.inf, 3), "inner": Inner(value=math.nan)})
    document = json.loads(json.dumps(record.to_json(), allow_nan=False))
    assert (document["pair"], document["value"]) == ([None, 3], None)
    read = Outer.from_json(document)
    assert math.isnan(read.pair[0])
    assert read.inner.value is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", 3), ("name", None), ("note", ["x"]), ("texts", "x"), ("texts", [1]), ("value", "0.5"), ("value", True),
     ("pair", [0.5, 1.5]), ("pair", [0.5, True]), ("pair", "ab"), ("by_model", [1]), ("by_model", {"T1": 3})],
)  # fmt: skip
def test_a_value_of_another_kind_is_an_error(key: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        Outer.from_json({**WHOLE.to_json(), key: value})
    assert Outer.from_json({**WHOLE.to_json(), "value": 1}).inner.value == 1, "control: a whole number is a number"


@pytest.mark.parametrize("missing", [{"interval": [None, 1.0]}, {"interval": [0.5, None]}, {"unprotected": None}])
def test_a_d_star_that_nothing_stands_behind_is_no_result(missing: dict[str, Any], tmp_path: Path) -> None:
    """A stranger's file, or a damaged one: refused where it is read, and not where it is printed."""
    path = tmp_path / "audit.json"
    path.write_text(json.dumps(document()))
    assert read_audit(tmp_path).protections, "control"
    path.write_text(json.dumps(document(**missing)))
    with pytest.raises(BadInput, match="is not the result of an audit"):
        read_audit(tmp_path)
    path.write_text(json.dumps(document(d_star=None, **missing)))
    assert read_audit(tmp_path).protections, "without D* there need be nothing"


def test_a_control_is_undecided_about_a_value(tmp_path: Path) -> None:
    found = document()
    for value, is_read in ((0.3, True), (None, False)):
        found["controls"][0] |= {"value": value, "undecided": True}
        (tmp_path / "audit.json").write_text(json.dumps(found))
        if is_read:
            assert read_audit(tmp_path).controls[0].undecided
        else:
            with pytest.raises(BadInput, match="is not the result of an audit"):
                read_audit(tmp_path)
