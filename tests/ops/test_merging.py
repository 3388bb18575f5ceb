"""Merges as a program asks for them: by method, by mergekit configuration, and through mergekit itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from merges.small_models import make_models, write_checkpoint
from unmergeable import ops
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges import Slerp, TaskArithmetic, Ties, engine, merge_state_dicts
from unmergeable.merges.mergekit import documents
from unmergeable.merges.variation import Variation

State = dict[str, torch.Tensor]


@pytest.fixture
def models(tmp_path: Path) -> tuple[State, list[State]]:
    """A base and two experts in folders of their names, beside the configurations."""
    base, experts = make_models(2, torch.bfloat16)
    for name, state in zip(("base", "a", "b"), (base, *experts), strict=True):
        write_checkpoint(tmp_path / name, state)
    return base, experts


def write_config(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def read(folder: Path) -> State:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def equal(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_by_method(tmp_path: Path, models: tuple[State, list[State]]) -> None:
    base, experts = models
    result = ops.merge(
        experts=[(tmp_path / "a", 0.5), (tmp_path / "b", None)],
        method="task_arithmetic",
        base=tmp_path / "base",
        out=tmp_path / "out",
    )
    assert equal(
        read(tmp_path / "out"), merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.5, None])
    )
    assert result.to_json() == {
        "out": str(tmp_path / "out"),
        "method": "task_arithmetic",
        "backend": "own",
        "settings": {"scaling_coefficient": 0.3},
        "experts": [
            {"path": str(tmp_path / "a"), "coefficient": 0.5},
            {"path": str(tmp_path / "b"), "coefficient": 0.3},
        ],
        "tensors": len(base),
        "learnt": None,
        "notes": [],
    }


def test_text_and_names_on_the_hub_are_folders_too(
    tmp_path: Path, models: tuple[State, list[State]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = models
    monkeypatch.setattr("unmergeable.checkpoint.hub.download", lambda name: tmp_path / name.rpartition("/")[2])
    result = ops.merge(
        experts=[("hub:somebody/a", 0.5), str(tmp_path / "b")],
        method="task_arithmetic",
        base="hub:somebody/base",
        out=str(tmp_path / "out"),
    )
    expected = merge_state_dicts(base, experts, method=TaskArithmetic(), coefficients=[0.5, None])
    assert equal(read(tmp_path / "out"), expected)
    assert result.experts == (("hub:somebody/a", 0.5), (str(tmp_path / "b"), 0.3))
    assert result.lines() == [
        f"Merged: {tmp_path / 'out'} (task_arithmetic; {len(base)} tensors)",
        "  0.5 of hub:somebody/a",
        f"  0.3 of {tmp_path / 'b'}",
    ]


def test_by_configuration(tmp_path: Path, models: tuple[State, list[State]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths start at the file, wherever the process is; the donor is the base, wherever it is listed."""
    base, experts = models
    config = write_config(
        tmp_path,
        """
        models:
          - {model: a, parameters: {weight: [0, 1]}}
          - {model: ./b, parameters: {weight: 0.5, density: 0.25}}
          - model: base
        merge_method: ties
        base_model: base
        parameters: {density: 0.5}
        dtype: float32
        tokenizer_source: base
        """,
    )
    monkeypatch.chdir("/")
    result = ops.merge(config=config, out=tmp_path / "out")
    weights = {"layers.0.weight": 0.0, "layers.0.bias": 0.0, "layers.1.weight": 1.0}

    def vary(name: str) -> Variation:
        return Variation((weights.get(name, 0.0), 0.5), {"density": (0.5, 0.25)})

    method = Ties(trim="tensor", average="weight", undecided="positive")
    expected = merge_state_dicts(base, experts, method=method, vary=vary, out_dtype=torch.float32)
    assert equal(read(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert result.experts == (("a", None), ("./b", 0.5))


def test_slerp_by_configuration(tmp_path: Path, models: tuple[State, list[State]]) -> None:
    base, (expert, _) = models
    text = "{models: [{model: a}, {model: base}], merge_method: slerp, base_model: base, parameters: {t: 0.25}}"
    ops.merge(config=write_config(tmp_path, text), out=tmp_path / "out")
    assert equal(read(tmp_path / "out"), merge_state_dicts(None, [base, expert], method=Slerp(t=0.25)))


def test_an_adapter_is_named_with_its_base(tmp_path: Path, models: tuple[State, list[State]]) -> None:
    document = {"models": [{"model": "base+lora"}, {"model": "a"}], "base_model": "base"}
    absolute = documents.absolute_paths(document, tmp_path)
    assert absolute["models"][0] == {"model": f"{tmp_path / 'base'}+{tmp_path / 'lora'}"}
    assert documents.models_named(document) == ("base+lora", "a", "base")
    with pytest.raises(BadInput, match=r"model base\+lora: .*lora is no folder"):
        documents.open_model("base+lora", tmp_path)
    write_checkpoint(tmp_path / "c++", models[0])  # a folder may have a plus in its name
    assert documents.open_model("c++", tmp_path).folder == tmp_path / "c++"


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"method": "task_arithmetic"}, UsageError, "either a configuration file, or"),
    ({"settings": {"density": 1}}, UsageError, "either a configuration file, or"),
    ({"config": None}, UsageError, "name the merge"),
    ({"config": None, "method": "tiess"}, UsageError, r"'tiess'; did you mean 'ties'\?"),
    ({"backend": "theirs"}, UsageError, "no backend is called 'theirs'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_refuses(arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        ops.merge(**{"config": tmp_path / "config.yaml", "out": tmp_path / "out", **arguments})


CONFIGS: list[tuple[str, str]] = [
    ("{models: [{model: a}, {model: b}], merge_method: ties, base_model: base}", "ties needs weight of a for tensor"),
    ("{models: [{model: a}, {model: c}], merge_method: linear}", "model c: .*c is no folder"),
    (
        "{models: [{model: a}, {model: b}], merge_method: ties, base_model: base, parameters: {weight: 1, density: 2}}",
        "density=2.0: must lie",
    ),
    ("{models: [{model: a}], merge_method: model_stock, base_model: base}", "at least 2 needed"),
    ("{models: [{model: a}, {model: b}], merge_method: linear, parameters: {wait: 1}}", "did you mean 'weight'"),
]


@pytest.mark.parametrize(("text", "message"), CONFIGS, ids=[text for text, _ in CONFIGS])
def test_refuses_configurations(text: str, message: str, tmp_path: Path, models: tuple[State, list[State]]) -> None:
    with pytest.raises((BadInput, UsageError), match=message) as caught:
        ops.merge(config=write_config(tmp_path, text), out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What mergekit would be asked."""
    calls: list[dict[str, Any]] = []

    def record(document: Any, inputs: Any, out: Path, **options: Any) -> None:
        calls.append({"document": document, "inputs": list(inputs), **options})

    monkeypatch.setattr("unmergeable.ops.merging.merge_with_mergekit", record)
    monkeypatch.setattr("unmergeable.ops.merging.find_command", lambda: "mergekit-yaml")
    return calls


def test_mergekit_is_given_the_method(
    tmp_path: Path, models: tuple[State, list[State]], asked: list[dict[str, Any]]
) -> None:
    result = ops.merge(
        experts=[(tmp_path / "a", 0.5), (tmp_path / "b", None)],
        method="ties",
        base=tmp_path / "base",
        settings={"density": "0.3", "normalize": "false"},
        backend="mergekit",
        out=tmp_path / "out",
    )
    assert asked[0]["document"] == {
        "merge_method": "ties",
        "models": [
            {"model": str(tmp_path / "a"), "parameters": {"weight": 0.5}},
            {"model": str(tmp_path / "b"), "parameters": {"weight": 1.0}},
        ],
        "base_model": str(tmp_path / "base"),
        "parameters": {"density": 0.3, "normalize": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    assert asked[0]["inputs"] == ["base", "expert 1", "expert 2"]
    assert (result.backend, result.tensors) == ("mergekit", len(models[0]))
    with pytest.raises(BadInput, match=r"no parameter of ties is called 'trim'"):
        ops.merge(
            experts=[(tmp_path / "a", None), (tmp_path / "b", None)],
            method="ties",
            base=tmp_path / "base",
            settings={"trim": "global"},
            backend="mergekit",
            out=tmp_path / "out",
        )


def test_a_setting_that_is_no_value_to_yaml_is_named(
    tmp_path: Path, models: tuple[State, list[State]], asked: list[dict[str, Any]]
) -> None:
    experts = [(tmp_path / "a", None), (tmp_path / "b", None)]
    settings = {"density": "2024-13-45"}
    with pytest.raises(BadInput, match=r"^setting density is not valid YAML: month must be in 1..12"):
        ops.merge(
            experts=experts,
            method="ties",
            base=tmp_path / "base",
            settings=settings,
            backend="mergekit",
            out=tmp_path / "out",
        )
    assert not asked


def test_mergekit_is_not_asked_for_what_it_has_not(
    tmp_path: Path, models: tuple[State, list[State]], asked: list[dict[str, Any]]
) -> None:
    experts = [(tmp_path / "a", None), (tmp_path / "b", None)]
    with pytest.raises(UsageError, match="mergekit has no iso_c"):
        ops.merge(experts=experts, method="iso_c", base=tmp_path / "base", backend="mergekit", out=tmp_path / "out")
    assert not asked


def test_mergekit_is_given_slerp_from_the_first_to_the_second(
    tmp_path: Path, models: tuple[State, list[State]], asked: list[dict[str, Any]]
) -> None:
    experts = [(tmp_path / "a", 1.0), (tmp_path / "b", 3.0)]
    ops.merge(experts=experts, method="slerp", backend="mergekit", out=tmp_path / "out")
    assert asked[0]["document"]["base_model"] == str(tmp_path / "a")
    assert asked[0]["document"]["parameters"] == {"t": 0.75}


def test_mergekit_is_given_the_configuration_with_absolute_paths(
    tmp_path: Path, models: tuple[State, list[State]], asked: list[dict[str, Any]]
) -> None:
    text = """
        slices:
          - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
        merge_method: karcher
        base_model: base
        out_dtype: float16
    """
    result = ops.merge(config=write_config(tmp_path, text), backend="mergekit", out=tmp_path / "out", seed=3)
    expected = yaml.safe_load(text)
    expected["base_model"] = str(tmp_path / "base")
    for source in expected["slices"][0]["sources"]:
        source["model"] = str(tmp_path / source["model"])
    assert asked[0]["document"] == expected
    assert (asked[0]["inputs"][0], asked[0]["out_dtype"], asked[0]["seed"]) == ("base", torch.float16, 3)
    assert result.experts == (("a", None), ("b", None))
    with pytest.raises(BadInput, match="names no models"):
        ops.merge(config=write_config(tmp_path, "{merge_method: linear}"), backend="mergekit", out=tmp_path / "out")


@pytest.mark.parametrize("by_configuration", [False, True])
def test_a_result_that_is_in_its_place_is_not_read_again(
    by_configuration: bool, tmp_path: Path, models: tuple[State, list[State]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that fails there would be told as a failure, and the same command would find OUT in its way."""
    make = engine.merge

    def gone(*arguments: Any, **keywords: Any) -> Any:
        manifest = make(*arguments, **keywords)
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        return manifest

    monkeypatch.setattr(engine, "merge", gone)
    if by_configuration:
        text = (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
        )
        result = ops.merge(config=write_config(tmp_path, text), out=tmp_path / "out")
    else:
        result = ops.merge(experts=[tmp_path / "a", tmp_path / "b"], method="linear", out=tmp_path / "out")
    assert result.tensors == len(read(tmp_path / "elsewhere"))
