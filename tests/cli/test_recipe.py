"""Recipe files in both languages and forms; whatever else they hold is refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from unmergeable.cli.recipe import read_recipe
from unmergeable.errors import BadInput, UnmergeableError, UsageError
from unmergeable.ops.steps import steps_of
from unmergeable.protections import PROTECTIONS


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


SHORT = {"method": "mergelock", "settings": {"condition": 8}}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.json", SHORT),
        ("r.json", {"steps": [SHORT]}),
        ("r.yaml", "method: mergelock\nsettings:\n  condition: 8\n"),
        ("r.yaml", "steps:\n- method: mergelock\n  settings: {condition: 8}\n"),
    ],
)
def test_forms_and_languages_agree(name: str, content: object, tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path, name, content)) == (["mergelock"], {"condition": 8})


def test_settings_are_optional(tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path, "r.yaml", "method: mergelock\nsettings:\n")) == (["mergelock"], {})


def test_settings_of_several_steps_carry_their_method(tmp_path: Path) -> None:
    steps = [SHORT, {"method": "other", "settings": {"condition": 2, "depth": 1}}, {"method": "third"}]

    methods, settings = read_recipe(write(tmp_path, "r.json", {"steps": steps}))

    assert methods == ["mergelock", "other", "third"]
    assert settings == {"mergelock.condition": 8, "other.condition": 2, "other.depth": 1}


def test_every_protection_may_stand_in_a_recipe(tmp_path: Path) -> None:
    settings = {"sensitivity_shield": {"unit": 0.1}, "mergelock": {"condition": 2}, "gauge": {"condition": 3}}
    names = [
        "trap2",
        "anchor_repulsive",
        "collapse",
        "mergeguard",
        "sensitivity_shield",
        "mergelock",
        "params",
        "gauge",
        "taylor_mlp",
    ]
    steps = [{"method": name, "settings": settings.get(name, {})} for name in names]

    found = steps_of(*read_recipe(write(tmp_path, "r.json", {"steps": steps})))

    assert [step.name for step in found] == [*names[:5], "mergelock,params,gauge", "taylor_mlp"]
    assert {name: values for step in found for name, values in step.settings.items() if values} == settings | {
        "params": {"quantisation": "kept"}  # what a release gets where nothing is said
    }
    assert set(names) | {"mergebarrier"} == set(PROTECTIONS)


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ({"methd": "mergelock"}, UsageError, ["methd", "did you mean 'method'"]),
        ({"steps": [SHORT, {"method": "x", "setting": {}}]}, UsageError, ["step 2", "did you mean 'settings'"]),
        ({"steps": [SHORT], "method": "x"}, UsageError, ["'method'", "steps"]),
        ({"steps": []}, UsageError, ["at least one"]),
        ({"steps": SHORT}, UsageError, ["list"]),
        ({"steps": ["mergelock"]}, UsageError, ["step 1", "mapping"]),
        ({"settings": {}}, UsageError, ["must name its method"]),
        ({"method": ["mergelock"]}, UsageError, ["must name its method"]),
        ({"method": "mergelock", "settings": [8]}, UsageError, ["settings", "mapping"]),
        ([SHORT], UsageError, ["mapping"]),
        ("{", BadInput, ["not valid JSON"]),
    ],
)
def test_anything_else_is_refused(
    content: object, kind: type[UnmergeableError], words: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path, "r.json", content)

    with pytest.raises(kind) as refused:
        read_recipe(path)

    assert [word for word in [str(path), *words] if word not in str(refused.value)] == []


@pytest.mark.parametrize("content", ["a: [", "!!python/object/apply:os.getcwd []", "{1: 2}", ""])
def test_broken_or_hostile_yaml_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(UnmergeableError, match=r"r\.yaml"):
        read_recipe(write(tmp_path, "r.yaml", content))


def test_a_recipe_must_be_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(b"\xff\xfe{")

    for path in (tmp_path / "r.json", tmp_path / "missing.json", tmp_path):
        with pytest.raises(BadInput, match="cannot be read"):
            read_recipe(path)


def test_yaml_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "r.yaml", "method: mergelock\n")
    monkeypatch.setitem(sys.modules, "yaml", None)

    with pytest.raises(UsageError, match="pip install pyyaml"):
        read_recipe(path)
    assert read_recipe(write(tmp_path, "r.json", SHORT))[0] == ["mergelock"], "JSON needs no package"
