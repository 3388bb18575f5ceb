"""Threat models: found by name and by code, each containing those before it."""

from __future__ import annotations

import pytest

from unmergeable.errors import BadInput
from unmergeable.evaluation.threat_models import ThreatModel, least


def test_names_and_codes_are_the_same() -> None:
    for model in ThreatModel:
        assert ThreatModel.named(model.label) is ThreatModel.named(model.code) is model
        assert str(model) == model.label
    with pytest.raises(BadInput, match="'withe_box'; did you mean 'white_box'"):
        ThreatModel.named("withe_box")


def test_each_contains_those_before_it() -> None:
    models = list(ThreatModel)
    for number, model in enumerate(models):
        assert [model.includes(other) for other in models] == [place <= number for place in range(len(models))]
    assert least([]) is ThreatModel.OFF_THE_SHELF
    assert least([ThreatModel.FEW_SHOT, ThreatModel.WHITE_BOX]) is ThreatModel.FEW_SHOT
    assert [model.trains for model in models] == [False, False, True, True]
