"""Threat models: found by name and by code, each of those who merge containing those before it."""

from __future__ import annotations

import pytest

from unmergeable.errors import BadInput
from unmergeable.evaluation.threat_models import ThreatModel, least

BESIDE = (ThreatModel.BLACK_BOX, ThreatModel.RETRAIN)


def test_names_and_codes_are_the_same() -> None:
    for model in ThreatModel:
        assert ThreatModel.named(model.label) is ThreatModel.named(model.code) is model
        assert str(model) == model.label
    with pytest.raises(BadInput, match="'withe_box'; did you mean 'white_box'"):
        ThreatModel.named("withe_box")


def test_each_who_merges_contains_those_before_it() -> None:
    models = [model for model in ThreatModel if model.merges]
    assert [model.code for model in models] == ["T0", "T1", "T2", "T3"]
    for number, model in enumerate(models):
        assert [model.includes(other) for other in models] == [place <= number for place in range(len(models))]
    assert least([]) is ThreatModel.OFF_THE_SHELF
    assert least([ThreatModel.FEW_SHOT, ThreatModel.WHITE_BOX]) is ThreatModel.FEW_SHOT
    assert [model.trains for model in models] == [False, False, True, True]


def test_those_who_merge_nothing_stand_beside_them() -> None:
    for model in BESIDE:
        assert [other for other in ThreatModel if model.includes(other)] == [model]
        assert not any(other.includes(model) for other in ThreatModel if other is not model)
        # a merge of a student takes ordinary tools, which everybody has
        assert least([model, ThreatModel.OFF_THE_SHELF]) is model
        assert least([model, ThreatModel.UNLABELLED]) is ThreatModel.UNLABELLED
    assert [model.trains for model in BESIDE] == [False, True]


def test_what_takes_no_victim_anybody_may() -> None:
    for model in ThreatModel:
        assert model.may(ThreatModel.OFF_THE_SHELF, with_victim=False)
        assert model.may(ThreatModel.OFF_THE_SHELF, with_victim=True) == model.merges
    assert not ThreatModel.BLACK_BOX.may(ThreatModel.FEW_SHOT, with_victim=False)
