from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polynomials.written import original
from unmergeable.errors import UsageError
from unmergeable.polynomials.rewriting import Rewriting
from unmergeable.protections.taylor_mlp import TaylorMLP


def test_published_settings_and_ours(tmp_path: Path) -> None:
    model = original("llama", tmp_path / "llama")
    ours = TaylorMLP().rewriting(model.source, model.architecture, model.ranges).section
    published = TaylorMLP(as_published=True).rewriting(model.source, model.architecture, model.ranges).section

    assert (ours.basis, ours.order, ours.guard) == ("taylor", 8, "clamp")
    assert (published.guard, published.mask_order, published.mask_radius) == ("mask", 8, 2.5)
    # 8 000 of 11 008 units in the public code; 0.7 of 80 here.
    assert {place.units for place in ours.feed_forwards} == {56}
    plan = TaylorMLP().rewriting(model.source, model.architecture, model.ranges).plan
    assert all(tensor.edit is None for tensor in plan if "self_attn" in tensor.name)


def test_units_that_no_polynomial_fits_stay_as_they_are(tmp_path: Path) -> None:
    model = original("llama", tmp_path / "llama")
    ends = torch.where(torch.arange(80) < 20, 9.0, 1.0)  # the series of SiLU diverges beyond pi
    wide = {name: replace(seen, low=-ends.to(seen.low), high=ends.to(seen.high)) for name, seen in model.ranges.items()}

    def made(**settings: float) -> Rewriting:
        return TaylorMLP(share=1.0, **settings).rewriting(model.source, model.architecture, wide)  # type: ignore[arg-type]

    ours, all_units = made(), made(tolerance=math.inf)
    assert {place.units for place in ours.section.feed_forwards} == {60}
    assert {place.units for place in all_units.section.feed_forwards} == {80}
    assert all(error["largest"] <= 0.3 and error["expanded"] == 0.75 for error in ours.errors.values())
    assert all(error["largest"] > 0.3 for error in all_units.errors.values())
    # However strict, a feed-forward keeps the one that fits best.
    assert {place.units for place in made(tolerance=1e-300).section.feed_forwards} == {1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": 0}, "order must lie between 1 and 32, not 0"),
        ({"order": 33}, "order must lie between 1 and 32, not 33"),
        ({"share": 0.0}, "the share of hidden units must lie in"),
        ({"share": 1.5}, "the share of hidden units must lie in"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
        ({"mask_order": 0}, "mask_order must be at least 1"),
        ({"mask_radius": float("nan")}, "mask_radius above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    TaylorMLP().validate()
    with pytest.raises(UsageError, match=f"taylor_mlp: .*{message}"):
        TaylorMLP(**settings).validate()  # type: ignore[arg-type]
