"""What ``methods`` and ``schema`` say of protections, against what the protections do."""

from __future__ import annotations

from typing import Any

import pytest

from unmergeable import ops
from unmergeable.polynomials.layout import LAYOUTS
from unmergeable.protections import PROTECTIONS
from unmergeable.settings import configure

ENTRIES = {entry["name"]: entry for entry in ops.methods().to_json()["protections"]}
SCHEMA: Any = ops.schema()
STEPS = {step["properties"]["method"]["const"]: step for step in SCHEMA["properties"]["steps"]["items"]["oneOf"]}


def test_every_protection_is_listed_with_what_it_needs() -> None:
    assert list(ENTRIES) == list(STEPS) == list(PROTECTIONS)
    needs = {name: set(entry["needs"]) for name, entry in ENTRIES.items()}
    assert all(("key" in needs[name]) == entry["exact"] for name, entry in ENTRIES.items())
    assert needs["taylor_mlp"] == {"data"}
    assert needs["sensitivity_shield"] == {"base", "siblings", "data"}
    assert "training" in needs["mergeguard"]
    assert {need for its in needs.values() for need in its} <= {"base", "key", "data", "siblings", "training"}


def test_validity_is_told_for_every_family() -> None:
    families = ops.methods().families
    for name, entry in ENTRIES.items():
        assert list(entry["families"]) == list(families), name
        assert all(its["valid"] or its["reason"] for its in entry["families"].values()), name
    valid = {family for family, its in ENTRIES["taylor_mlp"]["families"].items() if its["valid"]}
    assert valid == set(families) & set(LAYOUTS)
    assert valid != set(families), "control: not every family has polynomials"
    assert "residual stream" in ENTRIES["gauge"]["families"]["llama"]["group"]
    assert not ENTRIES["mergeguard"]["families"]["UNet2DConditionModel"]["valid"]


@pytest.mark.parametrize("name", PROTECTIONS)
def test_the_schema_allows_the_defaults_and_what_can_be_chosen(name: str) -> None:
    kinds = {"number": (int, float), "integer": int, "boolean": bool, "string": str}
    settings: dict[str, Any] = STEPS[name]["properties"]["settings"]["properties"]
    method = PROTECTIONS[name]
    for setting in ENTRIES[name]["settings"]:
        allowed = settings[setting["name"]]
        if "enum" in allowed:
            assert setting["default"] in allowed["enum"]
            for choice in allowed["enum"]:
                assert getattr(configure(method, {setting["name"]: choice}), setting["name"]) == choice
        else:
            assert isinstance(setting["default"], kinds[allowed["type"]])
    assert set(settings) == {setting["name"] for setting in ENTRIES[name]["settings"]}
