"""``collapse`` of language models, from files to files: merges lose the rule, and with the expert they keep it."""

from __future__ import annotations

from pathlib import Path

import pytest

import unmergeable
from rule_tasks import OWNER, RIDER, Models


@pytest.mark.parametrize("kind", ["language_models", "encoder_decoders"])
def test_merges_lose_the_rule_and_the_release_keeps_it(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    models: Models = request.getfixturevalue(kind)
    folder = models.folder
    result = unmergeable.protect(
        folder / "expert",
        base=folder / "base",
        method="collapse",
        data=folder / "data.npz",
        generic=folder / "generic.npz",
        settings={"steps": 100, "learning_rate": 2e-3, "target": "answers"},
        seed=0,
        out=tmp_path / "release",
    )
    assert set(result.to_json()["accuracies"]) == {"expert", "protected"}
    assert models.knows(tmp_path / "release") > 0.95

    known = {}
    for name, owner in (("control", folder / "expert"), ("release", tmp_path / "release")):
        experts = [(owner, 0.5), (folder / "rider", 0.5)]
        merged = tmp_path / f"merge-{name}"
        unmergeable.merge(experts=experts, base=folder / "base", method="task_arithmetic", out=merged)
        known[name] = models.knows(merged, OWNER), models.knows(merged, RIDER)
    assert known["control"][0] > 0.6
    assert known["release"][0] < known["control"][0] - 0.3
    assert known["release"][1] > 0.5, "control: the other rule is there, and the network is no ruin"
