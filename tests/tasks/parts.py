"""What every scorer must do: be cut."""

from __future__ import annotations

from typing import Any

import numpy as np

from unmergeable.tasks import TaskScorer


def require_parts(scorer: TaskScorer, network: Any, *, tolerance: float) -> None:
    """The losses of two parts are those of the whole, in its order; in another order they are not: the control."""
    cut, whole = len(scorer) // 2, scorer.losses(network)
    assert len(scorer) == len(whole)
    parts = [scorer.only(0, cut), scorer.only(cut, len(scorer))]
    assert [len(part) for part in parts] == [cut, len(scorer) - cut]
    found = np.concatenate([part.losses(network) for part in parts])
    np.testing.assert_allclose(found, whole, rtol=0, atol=tolerance)
    assert not np.allclose(found[::-1], whole, rtol=0, atol=tolerance)
