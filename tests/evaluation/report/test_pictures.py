"""Pictures of an audit: the same figures as the result, also where something is missing."""

from __future__ import annotations

import pytest

from evaluation.documents import analysed, document
from unmergeable.evaluation.analyses import Analyses
from unmergeable.evaluation.report.pictures import Looks, front_picture, line_pictures, number, percent
from unmergeable.evaluation.results import AuditResult, Fronts
from unmergeable.page import Chart, Series
from unmergeable.page.charts import STYLES


def looks(**found: object) -> Looks:
    return Looks(Analyses.from_json({**analysed()["analyses"], **found}))


def test_a_front_joins_what_nothing_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen on other examples, a point may be beaten on these; the table has it, the line does not."""
    drawn: dict[str, Series] = {}

    def chart(series: list[Series], **_: object) -> Chart:
        drawn.update((one.label, one) for one in series)
        return Chart("", ())

    monkeypatch.setattr("unmergeable.evaluation.report.pictures.line_chart", chart)
    front = {
        "rider": "theirs",
        "seed": 0,
        "unprotected": [[0.8, 0.7], [0.5, 0.65], [0.5, 0.9]],
        "protected": [],
        "without_victim": [],
    }
    picture = front_picture("lock", Fronts.from_json(front))
    assert (drawn["unprotected"].xs, drawn["unprotected"].ys) == ([90.0, 70.0], [50.0, 80.0])
    assert len(picture.table.rows) == 3
    assert drawn["protected"].xs == []


def test_tables_hold_the_figures() -> None:
    (front,) = document()["protections"]["lock"]["fronts"]
    assert front_picture("lock", Fronts.from_json(front)).table.rows == (
        ("unprotected", "80.0", "70.0"),
        ("unprotected", "50.0", "90.0"),
        ("protected", "20.0", "70.0"),
        ("without the expert", "10.0", "90.0"),
    )
    (line,) = line_pictures(AuditResult.from_json(document()))
    assert line.title == "lock, theirs"
    assert line.table.columns == ("model", "0", "1")
    assert line.table.rows == (("unprotected", "90", "10"), ("lock", "90", "10"))
    (barrier,) = looks().barriers
    assert barrier.table.columns == ("model", "barrier", "0", "0.5", "1")
    assert barrier.table.rows[1] == ("lock, as released", "–", "2", "–", "0.1")
    noise, _ = looks().noise
    assert noise.table.rows[0] == ("unprotected", "90.0", "55.0")


def test_without_protections_the_expert_has_its_own_picture() -> None:
    found = document()
    del found["protections"]["lock"]
    found["connectivity"] = found["connectivity"][:2]
    assert [picture.title for picture in line_pictures(AuditResult.from_json(found))] == ["unprotected, theirs"]


def test_a_protection_looks_the_same_in_both_forms() -> None:
    """Also where the unprotected expert has no canonical form."""
    models = [
        model
        for model in analysed()["analyses"]["models"]
        if (model["protection"], model["form"]) != ("identity", "canonical")
    ]
    raw, canonical = looks(models=models).scaling
    samples = {key.label: key.sample for key in raw.chart.keys}
    assert [key.label for key in canonical.chart.keys] == ["lock"]
    assert canonical.chart.keys[0].sample == samples["lock"]
    assert STYLES[1].colour in samples["lock"]
    assert samples["unprotected"] != samples["lock"]  # control


def test_distances_of_all_protections_have_one_scale() -> None:
    """From the least to the largest of them, so that pictures can be compared."""
    pictures = looks().distances
    assert [picture.title for picture in pictures] == ["unprotected", "lock"]
    ticks = [picture.chart.svg.split('id="matplotlib.axis_2"')[1].count('id="ytick_') for picture in pictures]
    assert ticks[0] == ticks[1]


def test_what_could_not_be_measured_is_said_once() -> None:
    assert looks().refusals == ["parts, line of strange, as released: another <structure>"]
    assert len(looks().landscapes) == 4
    assert len(looks().maps) == 1
    assert looks(models=[]).barriers == looks(models=[]).noise == []
    assert looks(models=[]).sharpness is None


def test_numbers_as_text() -> None:
    assert (percent(0.1234), percent(None), number(1234.5), number(None)) == ("12.3", "–", "1.23e+03", "–")
