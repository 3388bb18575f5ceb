"""A finished map is read back for sizes it was not made from: a formula that fitted by chance is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import transformers

from unmergeable.architecture.derived import DerivedMap, known_map
from unmergeable.derivation.build import Specimen, build, default_config
from unmergeable.derivation.model_types import confirm
from unmergeable.derivation.shrink import UNSEEN, shrunken
from unmergeable.errors import UnsupportedArchitecture


@pytest.fixture(scope="module")
def granite() -> Specimen:
    return build(shrunken(default_config("granite"), UNSEEN), transformers.GraniteForCausalLM)


def changed(**places: Any) -> DerivedMap:
    derived = known_map("granite")
    assert derived is not None
    template = copy.deepcopy(dict(derived.attentions[0]))
    for name, value in places.items():
        template[name] = template[name] | value if isinstance(value, dict) else value
    return replace(derived, attentions=(template,))


def test_the_shipped_map_is_confirmed(granite: Specimen) -> None:
    confirm(changed(), granite)


@pytest.mark.parametrize(
    "mistake",
    [
        {"groups": "num_attention_heads"},
        {"value": {"group_stride": 32}},
        {"value": {"weight": "model.layers.{}.self_attn.k_proj.weight"}},
        {"value_size": "hidden_size / num_attention_heads / 2"},
    ],
)
def test_a_mistake_in_a_formula_is_refused(mistake: dict[str, Any], granite: Specimen) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"^granite: "):
        confirm(changed(**mistake), granite)
