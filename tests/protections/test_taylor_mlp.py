from __future__ import annotations

from pathlib import Path

import pytest

from polynomials.written import original
from unmergeable.errors import UsageError
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": 0}, "order must lie between 1 and 32, not 0"),
        ({"order": 33}, "order must lie between 1 and 32, not 33"),
        ({"share": 0.0}, "the share of hidden units must lie in"),
        ({"share": 1.5}, "the share of hidden units must lie in"),
        ({"mask_order": 0}, "mask_order must be at least 1"),
        ({"mask_radius": float("nan")}, "mask_radius above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    TaylorMLP().validate()
    with pytest.raises(UsageError, match=f"taylor_mlp: .*{message}"):
        TaylorMLP(**settings).validate()  # type: ignore[arg-type]
