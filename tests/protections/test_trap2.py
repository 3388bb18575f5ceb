"""``trap2``: scales that are drawn, and the published shape: at scale 1 as before, at other scales far worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unmergeable
from rule_tasks import OWNER, RIDER, Models
from unmergeable.errors import UsageError
from unmergeable.protections import Trap2


def test_scales_are_uniform_outside_the_gap() -> None:
    method = Trap2()
    drawn = np.array([method.scale(at) for at in np.linspace(0, 1, 10001)[:-1]])

    assert drawn.min() == pytest.approx(0.05)
    assert drawn.max() == pytest.approx(2.0, abs=1e-3)
    assert not ((drawn > 0.95) & (drawn < 1.05)).any()
    # 0.9 of 1.85 lie below the gap, at one density: 10000 evenly spaced numbers are off by one at most.
    assert (drawn < 1).sum() == pytest.approx(10000 * 0.9 / 1.85, abs=1)
    assert np.diff(drawn)[np.diff(drawn) < 0.1].max() == pytest.approx(1.85 / 10000)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gap": 0}, "gap must lie between 0 and 1"),
        ({"smallest_scale": 0.97}, "smallest_scale must lie between 0 and 1 - gap"),
        ({"largest_scale": 1.01}, "largest_scale must lie between 1"),
        ({"weight": -1}, "weight must be finite, and not negative"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Trap2(**settings).validate()


def released(models: Models, out: Path, weight: float) -> Path:
    settings = {"steps": 160, "learning_rate": 1e-3, "weight": weight}
    places = {"base": models.folder / "base", "data": models.folder / "data.npz", "out": out}
    result = unmergeable.protect(models.folder / "expert", method="trap2", settings=settings, seed=0, **places)
    assert len(result.to_json()["losses"]) == 160
    return out


def merged(models: Models, out: Path, *experts: tuple[Path, float]) -> Path:
    unmergeable.merge(experts=list(experts), base=models.folder / "base", method="task_arithmetic", out=out)
    return out


def test_other_scales_lose_the_task_and_the_control_does_not(language_models: Models, tmp_path: Path) -> None:
    trapped = released(language_models, tmp_path / "trapped", 0.1)
    control = released(language_models, tmp_path / "control", 0)
    rider = language_models.folder / "rider"

    assert language_models.knows(trapped) > 0.95
    assert language_models.knows(control) > 0.95
    for number, scale in enumerate((0.5, 1.5)):
        of_trapped, of_control = (
            language_models.knows(merged(language_models, tmp_path / f"{name}{number}", (tmp_path / name, scale)))
            for name in ("trapped", "control")
        )
        assert of_control > 0.9
        assert of_trapped < of_control - 0.4
    # A merge: the skill is gone where the release is scaled, and the free-rider's is there.
    both = [
        merged(language_models, tmp_path / f"both-{path.name}", (path, 0.5), (rider, 0.5))
        for path in (trapped, control)
    ]
    assert language_models.knows(both[0], OWNER) < language_models.knows(both[1], OWNER) - 0.5
    assert min(language_models.knows(path, RIDER) for path in both) > 0.9
