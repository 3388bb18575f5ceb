"""What a merge learns from is looked at before it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merges.small_models import make_models, write_checkpoint
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import BadInput
from unmergeable.merges import AdaMerging, Fisher, Merge, RegMean, Soup
from unmergeable.merges.learning import learnt_from_data
from unmergeable.progress import silent


@pytest.mark.parametrize("method", [Fisher(), RegMean(), Soup(), AdaMerging()], ids=lambda method: method.name)
def test_a_nan_is_named_before_anything_is_learnt(method: Merge, tmp_path: Path) -> None:
    """The folders hold no network that could be loaded, and there are no data: nothing was looked for."""
    base, experts = make_models(2)
    experts[1]["layers.0.weight"][3, 4] = torch.nan
    sources = [
        open_checkpoint(write_checkpoint(tmp_path / str(number), state))
        for number, state in enumerate((base, *experts))
    ]
    weighted = [(source, None) for source in sources[1:]]
    data, out = [tmp_path / "nothing"] * 2, tmp_path / "out"
    with (
        pytest.raises(BadInput, match=r"layers\.0\.weight: expert 2 .* holds NaN"),
        learnt_from_data(method, sources[0], weighted, data, out=out, progress=silent),
    ):
        pytest.fail("it was learnt from a NaN")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]
