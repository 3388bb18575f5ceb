"""Analyses of an audit's models: what a basis hides is seen, what was measured is kept, what cannot be is said."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from unmergeable import ops
from unmergeable.errors import BadInput, CheckpointError
from unmergeable.evaluation import analyses
from unmergeable.evaluation.analyses import Subject, Surroundings, analyse, look_at, subjects_of
from unmergeable.evaluation.cells import digest_of
from unmergeable.evaluation.models import Variant
from unmergeable.evaluation.plans.analysis_settings import AnalysisSettings, read_analysis_settings
from unmergeable.evaluation.plans.audit_plan import parse_plan
from unmergeable.evaluation.scoring import Checkpoint, ScoredTask
from unmergeable.pools.pool import WorkerPool

SETTINGS = AnalysisSettings(
    examples=60, line=(0.0, 0.5, 1.0), coefficients=(0.0, 1.0), noise=(0.0, 0.2), draws=2, radii=(0.005,), points=3
)


@pytest.fixture(scope="module")
def models(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Base, experts, and ``mine`` under params (scales up to 20), raw and canonical; also the canonical expert."""
    folder = tmp_path_factory.mktemp("models")
    paths = {name: workshop / name for name in ("base", "mine", "theirs")}
    paths["released"] = folder / "released"
    ops.protect(
        paths["mine"],
        base=paths["base"],
        out=paths["released"],
        method="params",
        settings={"quantisation": "free"},
        key=folder / "release.key",
        seed=0,
    )
    for name in ("released", "mine"):
        paths[f"{name}, canonical"] = folder / f"{name}-canonical"
        ops.recover(paths[name], base=paths["base"], method="nearest_orbit", out=paths[f"{name}, canonical"])
    return {name: Checkpoint(path, digest_of(path)) for name, path in paths.items()}


@pytest.fixture(scope="module")
def around(models: dict[str, Checkpoint], workshop: Path, whole_plan: dict[str, Any]) -> Surroundings:
    plan = parse_plan(whole_plan, workshop)
    entry = plan.task("mine-task")
    digests = {path: digest_of(path) for path in plan.paths}
    task = ScoredTask.of(entry, digests)
    return Surroundings(models["base"], models["mine"], (("theirs", models["theirs"]),), task, SETTINGS)


@pytest.fixture(scope="module")
def subjects(models: dict[str, Checkpoint]) -> list[Subject]:
    return [
        Subject("identity", 0, "raw", models["mine"]),
        Subject("identity", 0, "canonical", models["mine, canonical"]),
        Subject("params", 0, "raw", models["released"]),
        Subject("params", 0, "canonical", models["released, canonical"]),
    ]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "analyses"


@pytest.fixture(scope="module")
def found(subjects: list[Subject], around: Surroundings, kept: Path) -> Any:
    with WorkerPool(1) as pool:
        return analyse(subjects, around, kept, pool).to_json()


def test_a_basis_hides_what_canonical_weights_show(found: Any) -> None:
    """Canonical weights of the expert and of what was released of it are one point up to float32: so are the figures.

    2^-24 is taken up to 10^4-fold by the network and the fit; what the basis does to the raw ones is not small.
    """
    expert, canonical_expert, released, canonical = found["models"]
    close = 1e4 * 2.0**-24
    assert canonical["sharpness"]["rises"] == pytest.approx(canonical_expert["sharpness"]["rises"], rel=10 * close)
    assert released["sharpness"]["rises"][0] > 2 * expert["sharpness"]["rises"][0]
    for block, other in zip(canonical["parts"]["blocks"], canonical_expert["parts"]["blocks"], strict=True):
        assert block["distance"] == pytest.approx(other["distance"], rel=close)
        assert block["cosine"] > 0.9
    attention = [block for block in released["parts"]["blocks"] if block["part"] != "feed_forward"]
    assert all(abs(block["cosine"]) < 0.5 and block["norm_ratio"] > 5 for block in attention)
    for block in expert["parts"]["blocks"]:
        assert (block["norm_ratio"], block["cosine"]) == pytest.approx((1, 1))
    for model in found["models"]:
        assert model["sharpness"]["loss"] == pytest.approx(expert["sharpness"]["loss"], rel=close)
        assert model["refused"] == {}


def test_ends_of_curves_are_the_models_themselves(found: Any) -> None:
    for model in found["models"]:
        line, scaling = model["lines"]["theirs"], model["scaling"]
        assert line["positions"] == [0, 0.5, 1]
        assert line["losses"][-1] == pytest.approx(scaling["losses"][-1], rel=1e-4)
        assert line["credits"][-1] == scaling["credits"][-1] == model["noise"]["credits"][0][0]
        assert scaling["losses"][0] == pytest.approx(found["models"][0]["scaling"]["losses"][0], rel=1e-6), "the base"
        assert line["barrier"] >= 0


def test_landscape_and_maps_hold_all_models(found: Any) -> None:
    landscape = found["models"][2]["landscape"]
    assert landscape["places"]["base"] == [0, 0]
    assert landscape["places"]["rider"][1] == pytest.approx(0, abs=1e-6)
    assert landscape["xs"][0] < 0 < landscape["places"]["rider"][0] < landscape["xs"][-1]
    assert len(landscape["losses"]) == len(landscape["ys"]) == 3
    raw, canonical = found["maps"]
    assert [point["name"] for point in raw["points"]] == ["base", "theirs", "identity", "params"]
    far, near = ({point["name"]: (point["x"], point["y"]) for point in one["points"]} for one in (raw, canonical))
    assert near["params"] == pytest.approx(near["identity"], abs=1e-2), "in one place"
    assert abs(far["params"][0] - far["identity"][0]) > 1  # control


def test_everything_is_json_and_calls_can_be_sent(
    found: Any, subjects: list[Subject], around: Surroundings, kept: Path
) -> None:
    assert json.loads(json.dumps(found, allow_nan=False))["models"] == found["models"]
    assert pickle.loads(pickle.dumps((look_at, (subjects[0], around, kept))))[1][0] == subjects[0]


def test_what_was_measured_is_kept(
    found: Any, subjects: list[Subject], around: Surroundings, kept: Path, tmp_path: Path
) -> None:
    """Lost and damaged measurements are made again, and nothing else."""
    folder = tmp_path / "analyses"
    shutil.copytree(kept, folder)
    lost, damaged, *others = sorted(folder.iterdir())
    lost.unlink()
    damaged.write_text("{")
    before = {path: path.stat().st_mtime_ns for path in others}
    with WorkerPool(1) as pool:
        assert analyse(subjects, around, folder, pool).to_json()["models"] == found["models"]
    assert {path: path.stat().st_mtime_ns for path in others} == before
    assert lost.exists()
    assert json.loads(damaged.read_text())
    count = len(list(folder.iterdir()))
    look_at(subjects[0], replace(around, settings=replace(SETTINGS, draws=1)), folder)
    assert len(list(folder.iterdir())) == count + 1, "only the noise depends on the draws"


def test_what_cannot_be_measured_is_said(around: Surroundings, workshop: Path, tmp_path: Path) -> None:
    """A model of another structure has no merges; that is no failure of the audit."""
    other = tmp_path / "other"
    shutil.copytree(workshop / "mine", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    tensors = load_file(workshop / "mine" / "model.safetensors")
    first = next(iter(tensors))
    tensors[f"{first}.renamed"] = tensors.pop(first)
    save_file(tensors, other / "model.safetensors")
    folder = tmp_path / "analyses"
    folder.mkdir()
    subject = Subject("strange", 0, "raw", Checkpoint(other, "strange"))
    found = look_at(subject, around, folder)
    assert set(found.refused) == {"parts", "line", "scaling", "noise", "sharpness", "landscape"}
    assert "unheard-of" in found.refused["parts"]
    assert found.lines == {"theirs": None}
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_no_refusal(
    around: Surroundings, subjects: list[Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise CheckpointError("disk full while writing")

    monkeypatch.setattr(analyses, "replace_file", full)
    with pytest.raises(CheckpointError, match="disk full"):
        look_at(subjects[0], around, tmp_path)


def test_subjects_are_released_models_and_their_canonical_form(models: dict[str, Checkpoint]) -> None:
    checkpoint = models["mine"]

    def variant(protection: str, seed: int, recovery: str | None = None, method: str = "") -> Variant:
        return Variant(protection, seed, recovery, checkpoint, 0.0, {"method": method})

    variants = [
        variant("identity", 0),
        variant("identity", 0, "mine", "nearest_orbit"),
        variant("scale", 0),
        variant("lock", 3),
        variant("lock", 3, "kabsch", "kabsch"),
        variant("lock", 3, "nearest_orbit", "nearest_orbit"),
        variant("lock", 4),
        replace(variant("lock", 3, "again", "nearest_orbit"), checkpoint=None, refusal="no"),
    ]
    assert [(one.protection, one.seed, one.form) for one in subjects_of(variants)] == [
        ("identity", 0, "raw"),
        ("identity", 0, "canonical"),
        ("lock", 3, "raw"),
        ("lock", 3, "canonical"),
    ]


def test_settings_are_those_of_the_plan() -> None:
    assert read_analysis_settings(None, "plan, analyses") is None
    assert read_analysis_settings({}, "plan, analyses") == AnalysisSettings()
    found = read_analysis_settings({"examples": 7, "line": [1, 0], "noise": [0.5]}, "plan, analyses")
    assert found == AnalysisSettings(examples=7, line=(0.0, 1.0), noise=(0.5,))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"exmples": 7}, "plan, analyses has no entry 'exmples'.*examples"),
        ({"examples": 0}, "examples: must be a whole number of at least 1"),
        ({"points": 1}, "points: must be a whole number of at least 2"),
        ({"noise": "much"}, "noise: must be a list of numbers"),
        ({"line": [0.5, 1]}, "must contain 0 and 1"),
        ({"radii": [-0.1]}, "must not be negative"),
        (["examples"], "a mapping is wanted"),
    ],
)
def test_settings_that_mean_nothing_are_refused(document: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_analysis_settings(document, "plan, analyses")


def test_the_documentation_names_every_setting_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)
    settings = AnalysisSettings()
    documented = [name for names, _ in rows for name in re.findall(r"\w+", names) if hasattr(settings, name)]
    assert documented == [field.name for field in fields(settings)]
    defaults = dict(rows)
    assert defaults["`examples`"] == f"{settings.examples}"
    for names, default in (("`noise`, `draws`", settings.noise), ("`radii`, `steps`", settings.radii)):
        assert defaults[names].startswith(", ".join(f"{value:g}" for value in default) + ";")
