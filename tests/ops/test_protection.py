"""``protect`` with every kind of protection and their compositions: order, settings, interruption, restoring."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unmergeable
from unmergeable.checkpoint import scratch
from unmergeable.checkpoint.manifest import check_files, read_manifest
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import BadInput, KeyFileError, UsageError
from unmergeable.ops import protection
from unmergeable.ops.protect_result import ProtectResult, StepReport
from unmergeable.ops.steps import Step, steps_of
from unmergeable.protections import PROTECTIONS, Facts
from unmergeable.protections.exact import ExactFacts
from unmergeable.protections.mergeguard.method import MergeGuardFacts
from unmergeable.protections.polynomial import PolynomialFacts
from unmergeable.protections.sensitivity_shield.method import ShieldFacts
from zoo import TOYS, write_toy


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A base, an expert, two siblings, and data as token ids."""
    for seed, name in enumerate(("base", "expert", "sibling", "other")):
        write_toy(TOYS["gpt2"], tmp_path / name, seed=seed)
    np.savez(tmp_path / "data.npz", input_ids=np.random.default_rng(0).integers(3, 67, size=(8, 11)))
    return tmp_path


def protect(work: Path, method: str, **options: Any) -> ProtectResult:
    options = {"base": work / "base", "out": work / "out", "seed": 7, **options}
    return unmergeable.protect(work / "expert", method=method, **options)


def shielded(work: Path) -> dict[str, Any]:
    return {"siblings": [work / "sibling", work / "other"], "data": work / "data.npz"}


def tensors(folder: Path) -> dict[str, Any]:
    source = Checkpoint.open(folder)
    return {name: source.tensor(name) for name in source.names}


def equal(first: Path, second: Path) -> bool:
    left, right = tensors(first), tensors(second)
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def limits(notes: Sequence[str]) -> list[str]:
    """What is said of the methods; the networks here are no fine-tunes, and their data are few, which is said too."""
    return [note for note in notes if not note.startswith("Warning: ")]


def test_what_a_protection_is_follows_from_its_settings() -> None:
    stages = {name: cls().requirements().stage for name, cls in PROTECTIONS.items()}
    assert {name for name, stage in stages.items() if stage == "weights"} == {
        "anchor_repulsive",
        "collapse",
        "mergeguard",
        "sensitivity_shield",
        "trap2",
    }
    assert {name for name, stage in stages.items() if stage == "structure"} == {"taylor_mlp", "mergebarrier"}
    (flipped,) = steps_of("mergebarrier", {"parts": "attention"})
    assert (flipped.requirements.exact, flipped.requirements.stage, flipped.reads) == (True, "basis", frozenset())
    assert not flipped.has_key
    (masking,) = steps_of("mergeguard", {"stages": "masking", "excluded_layers": 0})
    assert masking.reads == frozenset()
    (both,) = steps_of("mergeguard", {})
    assert both.reads == {"data", "training", "head", "encoder"}


@pytest.mark.parametrize(
    ("method", "kind"),
    [("mergelock,params", ExactFacts), ("taylor_mlp", PolynomialFacts), ("sensitivity_shield", ShieldFacts)],
)
def test_one_step_reports_its_own_facts(work: Path, method: str, kind: type[Facts]) -> None:
    reads = {"taylor_mlp": {"data": work / "data.npz"}, "sensitivity_shield": shielded(work)}
    result = protect(work, method, **reads.get(method, {}))

    (step,) = result.steps
    assert isinstance(step.facts, kind)
    assert result.out == work / "out"
    assert (work / "out.key").exists() == (kind is ExactFacts) == (result.measured_error is not None)
    assert not (work / "out.steps").exists()


def test_steps_are_applied_left_to_right(work: Path) -> None:
    """Shield, then a gauge, then polynomials: the same as three commands."""
    result = protect(work, "sensitivity_shield,mergelock,taylor_mlp", **shielded(work))
    protect(work, "sensitivity_shield", out=work / "first", **shielded(work))
    second = {"base": work / "base", "seed": 7, "key": work / "second.key"}
    unmergeable.protect(work / "first", method="mergelock", out=work / "second", **second)
    third = {"base": work / "base", "data": work / "data.npz"}
    unmergeable.protect(work / "second", method="taylor_mlp", out=work / "third", **third)

    assert [step.methods for step in result.steps] == [("sensitivity_shield",), ("mergelock",), ("taylor_mlp",)]
    assert [step.out for step in result.steps] == [work / "out.steps/1", work / "out.steps/2", work / "out"]
    # The secret of the gauge depends on the seed alone, so that both ways are the same bytes.
    assert equal(work / "out", work / "third")
    assert not equal(work / "first", work / "expert"), "control: a step changes something"
    assert not (work / "out.steps").exists()
    assert check_files(work / "out") == ()
    manifest = read_manifest(work / "out")
    assert manifest is not None
    assert manifest.details["recipe"]["method"] == "taylor_mlp"
    shield, lock = manifest.details["earlier_steps"]
    assert (shield["recipe"]["method"], lock["recipe"]["steps"][0]["method"]) == ("sensitivity_shield", "mergelock")
    assert "coefficients" not in json.dumps(shield), "what is mixed in is the owner's secret"
    assert "sibling" not in {Path(file["name"]).stem for role in shield["inputs"].values() for file in role}
    assert len(limits(json.loads(json.dumps(result.to_json()))["notes"])) == 3


def test_training_then_a_gauge(work: Path) -> None:
    """What a trained protection leaves beside its result is gone at the end, too."""
    settings = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "mergeguard.excluded_layers": 0}
    result = protect(work, "mergeguard,gauge", data=work / "data.npz", settings=settings)
    alone = {**settings, "excluded_layers": 0}
    alone.pop("mergeguard.excluded_layers")
    protect(work, "mergeguard", out=work / "first", data=work / "data.npz", settings=alone)

    trained, _ = result.steps
    assert isinstance(trained.facts, MergeGuardFacts)
    assert len(trained.facts.losses) == 2
    assert unmergeable.verify(work / "first", work / "out").is_equal
    assert not unmergeable.verify(work / "expert", work / "out").is_equal, "control"
    assert {path.name for path in work.iterdir() if "out" in path.name} == {"out", "out.key"}


def test_restoring_gives_the_step_before_back(work: Path) -> None:
    protect(work, "sensitivity_shield,gauge", key=work / "k", **shielded(work))
    protect(work, "sensitivity_shield", out=work / "first", **shielded(work))
    restored = unmergeable.restore(work / "out", key=work / "k", out=work / "restored")

    assert restored.note == "This is the result of sensitivity_shield, which no key undoes, and not the original."
    assert unmergeable.verify(work / "first", work / "restored").is_equal
    assert not unmergeable.verify(work / "expert", work / "restored").is_equal, "control"

    protect(work, "mergelock", out=work / "lone")
    assert unmergeable.restore(work / "lone", key=work / "lone.key", out=work / "again").note is None


def test_a_key_that_was_not_the_last_step_opens_nothing(work: Path) -> None:
    protect(work, "mergelock,taylor_mlp", data=work / "data.npz")
    with pytest.raises(BadInput, match="after the keyed step has no way back"):
        unmergeable.restore(work / "out", key=work / "out.key", out=work / "restored")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupted_composition_goes_on(work: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after ``at`` steps; finished ones are not done again, and the result is the same."""
    protect(work, "sensitivity_shield,mergelock,taylor_mlp", out=work / "whole", **shielded(work))
    done: list[str] = []

    write = protection._Request.write

    def interrupted(request: Any, step: Step, source: Path, out: Path) -> StepReport:
        if len(done) == at:
            raise KeyboardInterrupt
        done.append(step.name)
        return write(request, step, source, out)

    with monkeypatch.context() as patch:
        patch.setattr(protection._Request, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            protect(work, "sensitivity_shield,mergelock,taylor_mlp", **shielded(work))
    assert len(done) == at
    assert not (work / "out").exists()
    assert (work / "out.key").exists() == (at > 1)
    with pytest.raises(BadInput, match="unfinished work of another request"):
        protect(work, "sensitivity_shield,mergelock", **shielded(work))

    again: list[str] = []

    def noted(request: Any, step: Step, source: Path, out: Path) -> StepReport:
        again.append(step.name)
        return write(request, step, source, out)

    monkeypatch.setattr(protection._Request, "write", noted)
    result = protect(work, "sensitivity_shield,mergelock,taylor_mlp", **shielded(work))
    assert done + again == ["sensitivity_shield", "mergelock", "taylor_mlp"]
    assert equal(work / "out", work / "whole")
    assert [step.out for step in result.steps] == [work / name for name in ("out.steps/1", "out.steps/2", "out")]
    assert [step.facts is None for step in result.steps] == [number < at for number in range(3)]
    assert len(limits(result.notes)) == 3, "those of finished steps are read in their manifests"
    assert not (work / "out.steps").exists()


@pytest.mark.parametrize(
    "method", ["gauge", "mergebarrier", "sensitivity_shield", "sensitivity_shield,params,taylor_mlp"]
)
def test_a_dry_run_writes_nothing(work: Path, method: str) -> None:
    reads = shielded(work) if "shield" in method else {"data": work / "data.npz"} if "barrier" in method else {}
    before = sorted(path.name for path in work.iterdir())
    document = protect(work, method, dry_run=True, **reads).to_json()

    assert document["dry_run"] is True
    assert sorted(path.name for path in work.iterdir()) == before


def test_the_default_is_the_gauge_that_survives_quantisation(work: Path) -> None:
    by_default = unmergeable.protect(work / "expert", base=work / "base", out=work / "out", seed=7)
    named = protect(work, "gauge", out=work / "named", settings={"quantisation": "kept"})
    free = protect(work, "gauge", out=work / "free", settings={"quantisation": "free"})
    assert by_default.steps[0].methods == ("gauge",)
    assert equal(by_default.out, named.out)
    assert not equal(by_default.out, free.out), "control: the setting does something"


@pytest.mark.parametrize("method", ["gauge", "mergelock", "params"])
def test_exact_methods_keep_quantised_models_unless_asked_for_more(method: str) -> None:
    def of(**settings: object) -> str:
        (step,) = steps_of(method, settings)
        return step.single[0].quantisation

    assert of() == "kept"
    assert of(quantisation="free") == "free"
    # A setting that only says which matrices are drawn asks for them.
    wider: dict[str, dict[str, object]] = {
        "gauge": {"condition": 8}, "mergelock": {"condition": 8}, "params": {"smallest": 0.1},
    }  # fmt: skip
    assert of(**wider[method]) == "free"
    assert of(**({"attention": "true"} if method != "mergelock" else {"cross_attention": "true"})) == "kept"


@pytest.mark.parametrize(("method", "setting"), [
    ("gauge", "quantisation_friendly"), ("gauge", "untie"), ("mergelock", "as_published"), ("params", "as_published"),
])  # fmt: skip
def test_what_a_quantised_model_does_not_stand_is_not_drawn_beside_what_keeps_it(method: str, setting: str) -> None:
    with pytest.raises(
        UsageError, match=rf"^{method}: {setting} .*set quantisation=free as well, or leave {setting} out"
    ):
        steps_of(method, {setting: "true", "quantisation": "kept"})
    for remedy in ({setting: "true", "quantisation": "free"}, {"quantisation": "kept"}):
        assert steps_of(method, remedy)


def test_paths_may_be_text(work: Path) -> None:
    texts = {"base": f"{work}/base", "out": f"{work}/out", "data": f"{work}/data.npz"}
    unmergeable.protect(f"{work}/expert", method="taylor_mlp", **texts)
    unmergeable.protect(f"{work}/expert", base=f"{work}/base", out=f"{work}/locked", key=f"{work}/key")
    unmergeable.restore(f"{work}/locked", key=f"{work}/key", out=f"{work}/restored")
    assert unmergeable.verify(f"{work}/locked", f"{work}/restored").is_equal


def test_a_setting_goes_to_the_method_that_has_it() -> None:
    (step,) = steps_of("mergelock,params", {"largest": 5, "mergelock.condition": "2"})
    assert step.settings == {"mergelock": {"condition": "2"}, "params": {"largest": 5}}
    assert step.methods == ("mergelock", "params")
    shield, exact = steps_of(["sensitivity_shield", "params"], {"unit": 0.1, "smallest": 0.5})
    assert (shield.settings, exact.settings) == ({"sensitivity_shield": {"unit": 0.1}}, {"params": {"smallest": 0.5}})


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("mergelok", {}, "no protection is called 'mergelok'; did you mean 'mergelock'"),
        ("noise", {}, "'noise' is a control"),
        ("params,params", {}, "names a protection twice"),
        ("mergelock,gauge", {"condition": 2}, r"write mergelock\.condition or gauge\.condition"),
        ("mergelock,gauge", {"conditon": 2}, "did you mean 'condition'"),
        ("mergelock,params", {"gauge.condition": 2}, "'gauge', which is not among the methods"),
        ("mergelock,params", {"largest": 2, "params.largest": 3}, "given twice"),
        ("mergelock", {"condition": 0}, "condition must lie between"),
        ("taylor_mlp,gauge", {}, "whose symmetries are not known; write gauge,taylor_mlp"),
        ("gauge,sensitivity_shield", {}, "task vector, .*write sensitivity_shield,gauge"),
        ("taylor_mlp,mergebarrier", {}, "use one of them"),
        ("mergelock,mergebarrier,params", {"parts": "attention"}, "put them side by side"),
    ],
)
def test_refuses_methods_settings_and_orders(method: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        steps_of(method, settings)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("mergelock", {"data": "data.npz"}, "mergelock with these settings reads no data: leave out data"),
        ("taylor_mlp", {"data": "data.npz", "siblings": ["other"]}, "reads no siblings"),
        ("taylor_mlp", {}, "taylor_mlp is calibrated on data"),
        ("mergelock,taylor_mlp", {}, "taylor_mlp is calibrated on data"),
        ("sensitivity_shield", {"data": "data.npz"}, "give one for each coefficient"),
        ("sensitivity_shield", {"siblings": ["other"], "data": "data.npz"}, "siblings 1; give one for each"),
        ("sensitivity_shield", {"siblings": ["other", "sibling"]}, "give some with data=FILE"),
        ("taylor_mlp", {"data": "data.npz", "allow_pickle": True}, "leave out allow_pickle"),
    ],
)
def test_refuses_before_any_work(work: Path, method: str, options: dict[str, Any], message: str) -> None:
    paths = {
        name: [work / item for item in value] if isinstance(value, list) else work / value if name == "data" else value
        for name, value in options.items()
    }
    before = sorted(path.name for path in work.iterdir())
    with pytest.raises(UsageError, match=message):
        protect(work, method, **paths)
    assert sorted(path.name for path in work.iterdir()) == before


def test_places_that_are_taken(work: Path) -> None:
    for method in ("sensitivity_shield", "sensitivity_shield,gauge"):
        with pytest.raises(BadInput, match=r"its parent folder .* does not exist"):
            protect(work, method, out=work / "nowhere" / "out", **shielded(work))
    with pytest.raises(KeyFileError, match="would lie inside"):
        protect(work, "mergelock,taylor_mlp", key=work / "out" / "k", data=work / "data.npz")
    (work / "out.steps").mkdir()
    protect(work, "mergelock,taylor_mlp", data=work / "data.npz", dry_run=True)  # an empty folder is in nobody's way
    (work / "out.steps" / "mine").touch()
    with pytest.raises(BadInput, match="unfinished work of another request"):
        protect(work, "mergelock,taylor_mlp", data=work / "data.npz")
    (work / "out").mkdir()
    with pytest.raises(BadInput, match="exists"):
        protect(work, "mergelock,taylor_mlp", data=work / "data.npz")


def test_a_release_does_not_lie_in_its_inputs(work: Path) -> None:
    before = sorted(path.name for path in work.rglob("*"))
    for method in ("mergelock", "mergelock,gauge", "sensitivity_shield,gauge"):
        extras = shielded(work) if "shield" in method else {}
        for place in ("base", "expert"):
            with pytest.raises(BadInput, match="lie inside each other"):
                protect(work, method, out=work / place / "out", key=work / "k", **extras)
    assert sorted(path.name for path in work.rglob("*")) == before


@pytest.mark.parametrize("length", [246, 247, 250, 255])
def test_a_name_that_is_too_long_leaves_no_key_behind(work: Path, length: int) -> None:
    """Folders beside OUT take up to 9 bytes more, of 255 that a file system has for a name."""
    if length == 246:
        protect(work, "mergelock", out=work / ("x" * length))
        return
    with pytest.raises(BadInput, match=r"too long: names here have at most \d+ bytes"):
        protect(work, "mergelock", out=work / ("x" * length))
    assert not list(work.glob("x*"))


def test_the_same_exact_command_knows_its_whole_result(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = protect(work, "mergelock,gauge", settings={"mergelock.condition": 2}, seed=None)
    before = {path.name: path.read_bytes() for path in first.out.iterdir()}
    again = protect(work, "mergelock,gauge", settings={"mergelock.condition": 2}, seed=None)
    assert "is complete" in caplog.text
    assert again.fingerprint == first.fingerprint
    assert again.measured_error == first.measured_error, "it was verified again"
    assert {path.name: path.read_bytes() for path in first.out.iterdir()} == before
    with pytest.raises(KeyFileError, match="another checkpoint or recipe"):
        protect(work, "mergelock,gauge", settings={"mergelock.condition": 3}, seed=None)
    with pytest.raises(BadInput, match="exists"):
        protect(work, "mergelock", key=work / "other.key")
    with pytest.raises(BadInput, match="exists"):
        protect(work, "mergelock,gauge", settings={"mergelock.condition": 2}, dry_run=True)
    assert not (work / "other.key").exists()
    weights = first.out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(BadInput, match="exists"):  # the control: a result that was altered is not taken for whole
        protect(work, "mergelock,gauge", settings={"mergelock.condition": 2}, seed=None)


def test_a_key_does_not_depend_on_when_files_were_written(work: Path) -> None:
    first = protect(work, "mergelock")
    for path in (work / "expert").iterdir():
        os.utime(path, ns=(1, 1))
    second = protect(work, "mergelock", out=work / "second")
    assert second.fingerprint == first.fingerprint
    third = unmergeable.protect(work / "sibling", base=work / "base", method="mergelock", out=work / "third", seed=7)
    assert third.fingerprint != first.fingerprint, "control: another checkpoint of the same shapes"


@pytest.mark.parametrize("left", ["everything", "request", "nothing"])
def test_a_composition_killed_after_its_last_rename(work: Path, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(place: Path) -> None:
        if left == "request":
            scratch.empty(place)
        elif left == "nothing":
            scratch.empty(place)
            (place / scratch.MARKER).unlink()
        raise KeyboardInterrupt

    remove = scratch.remove
    with monkeypatch.context() as patch:
        patch.setattr(scratch, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            protect(work, "sensitivity_shield,mergelock", **shielded(work))
    assert check_files(work / "out") == ()
    assert scratch.remove is remove
    if left == "nothing":  # data decide too: nothing says any more that this is the result
        with pytest.raises(BadInput, match="exists"):
            protect(work, "sensitivity_shield,mergelock", **shielded(work))
        return
    with pytest.raises(BadInput, match="another request"):
        protect(work, "sensitivity_shield,gauge", **shielded(work))
    result = protect(work, "sensitivity_shield,mergelock", **shielded(work))
    assert [step.methods for step in result.steps] == [("sensitivity_shield",), ("mergelock",)]
    assert not (work / "out.steps").exists()
