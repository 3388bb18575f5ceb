"""``arcee_fusion`` finds its quartiles in parts, and they are those of a sort."""

from __future__ import annotations

import pytest
import torch

from unmergeable.merges.arcee_fusion import quartiles


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 1001])
@pytest.mark.parametrize("levels", [3, 10**6], ids=["equal", "distinct"])
def test_quartiles_are_at_their_ranks_in_a_sort(count: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(levels, (count,), generator=generator).float()
    before, ordered = values.clone(), values.sort().values
    assert quartiles(values) == tuple(float(ordered[int(share * (count - 1))]) for share in (0.25, 0.5, 0.75))
    assert torch.equal(values, before)
    if count == 1001:  # control: they differ, and are no others
        assert len(set(quartiles(values))) > 1
        assert quartiles(values + 1) != quartiles(values)
