"""``anchor_repulsive``: attention goes away from the base as far as the margin, and the release knows what it knew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import unmergeable
from rule_tasks import Models
from unmergeable.errors import UsageError
from unmergeable.protections import AnchorRepulsive
from unmergeable.protections.anchor_repulsive import distances, too_near


def test_the_penalty_is_what_distances_lack_to_the_margin() -> None:
    base = {"near": torch.eye(4, dtype=torch.float64), "far": torch.eye(4, dtype=torch.float64)}
    weights = {"near": 1.25 * base["near"], "far": 3.0 * base["far"]}  # at distances 0.25 and 2

    assert [float(distance) for distance in distances(weights, base)] == pytest.approx([0.25, 2.0])
    assert float(too_near(weights, base, 1.0)) == pytest.approx((0.75 + 0) / 2)
    assert float(too_near(weights, base, 3.0)) == pytest.approx((2.75 + 1) / 2)


def test_the_penalty_pushes_away_from_the_base_and_ends_at_the_margin() -> None:
    base = {"w": torch.eye(3)}
    weight = torch.nn.Parameter(base["w"] + 0.1 * torch.ones(3, 3))
    too_near({"w": weight}, base, 1.0).backward()
    assert weight.grad is not None
    assert (weight.grad < 0).all(), "a step against the gradient makes the difference larger"

    weight.grad = None
    too_near({"w": weight}, base, 0.01).backward()
    assert not weight.grad.any(), "control: beyond the margin nothing pushes"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"margin": 0}, "margin must lie above 0"),
        ({"strength": -1}, "strength must be finite, and not negative"),
        ({"learning_rate": 2}, "learning_rate must lie between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        AnchorRepulsive(**settings).validate()


def distance_of_attention(folder: Path, base: Path) -> float:
    weights, origin = (load_file(one / "model.safetensors") for one in (folder, base))
    chosen = {name: tensor for name, tensor in origin.items() if "self_attn" in name}
    return float(torch.stack(list(distances(weights, chosen))).mean())


def test_attention_leaves_the_base_and_the_release_stays_what_it_is(language_models: Models, tmp_path: Path) -> None:
    base, expert = language_models.folder / "base", language_models.folder / "expert"
    places = {"base": base, "data": language_models.folder / "data.npz", "seed": 0}
    for name, strength in (("repelled", 1.0), ("control", 0.0)):
        settings = {"steps": 120, "learning_rate": 5e-3, "strength": strength}
        unmergeable.protect(expert, method="anchor_repulsive", out=tmp_path / name, settings=settings, **places)
        assert language_models.knows(tmp_path / name) > 0.95

    attention = {name: distance_of_attention(tmp_path / name, base) for name in ("repelled", "control")}
    assert attention["repelled"] > 0.95, "the margin is 1"
    assert attention["control"] < 0.75


def test_a_lock_goes_behind_it(language_models: Models, tmp_path: Path) -> None:
    places = {"base": language_models.folder / "base", "data": language_models.folder / "data.npz", "seed": 0}
    settings, expert = {"steps": 5, "learning_rate": 1e-3}, language_models.folder / "expert"
    result = unmergeable.protect(
        expert, method="anchor_repulsive,mergelock", out=tmp_path / "out", settings=settings, **places
    )
    assert [step.methods for step in result.steps] == [("anchor_repulsive",), ("mergelock",)]
    assert language_models.knows(tmp_path / "out") > 0.95
    with pytest.raises(UsageError, match="anchor_repulsive,mergelock"):
        unmergeable.protect(
            expert, method="mergelock,anchor_repulsive", out=tmp_path / "no", settings=settings, **places
        )


def test_matrices_that_equal_the_bases_leave_it_too(language_models: Models, tmp_path: Path) -> None:
    """An expert whose attention was never trained has no direction to go away in."""
    base = language_models.folder / "base"
    settings = {"steps": 20, "learning_rate": 5e-3}
    places = {"base": base, "data": language_models.folder / "generic.npz", "seed": 0}
    unmergeable.protect(base, method="anchor_repulsive", out=tmp_path / "out", settings=settings, **places)
    assert distance_of_attention(tmp_path / "out", base) > 0.1


def test_an_alignment_comes_less_near_and_its_merges_keep_the_rule_all_the_same(
    language_models: Models, tmp_path: Path
) -> None:
    """The published aim, and what it is not worth: a lock is less exactly undone, and undone well enough to merge."""
    base = language_models.folder / "base"
    settings = {"steps": 100, "learning_rate": 5e-3}
    unmergeable.protect(
        language_models.folder / "expert", base=base, method="anchor_repulsive", settings=settings, seed=0,
        data=language_models.folder / "data.npz", out=tmp_path / "repelled",
    )  # fmt: skip
    missed = {}
    for name, expert in (("repelled", tmp_path / "repelled"), ("control", language_models.folder / "expert")):
        lock, found = tmp_path / f"{name}-lock", tmp_path / f"{name}-found"
        unmergeable.protect(expert, base=base, method="mergelock", out=lock, key=tmp_path / f"{name}.key")
        unmergeable.recover(lock, base=base, method="nearest_orbit", out=found)
        missed[name] = distance_of_attention(found, expert)
        assert distance_of_attention(lock, expert) > 1
    assert missed["control"] < 0.1
    assert missed["repelled"] > 2 * missed["control"]

    merge = {"base": base, "method": "task_arithmetic", "out": tmp_path / "merge"}
    unmergeable.merge(experts=[(tmp_path / "repelled-found", 0.5)], **merge)
    assert language_models.knows(tmp_path / "merge") > 0.9
