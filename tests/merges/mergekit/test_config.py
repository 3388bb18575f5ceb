"""mergekit's YAML means here what it means to mergekit, and a typo never passes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from unmergeable.errors import BadInput
from unmergeable.merges import (
    Breadcrumbs,
    DareLinear,
    DareTies,
    Della,
    Linear,
    Merge,
    ModelStock,
    Slerp,
    TaskArithmetic,
    Ties,
)
from unmergeable.merges.mergekit.config import Filtered, MergeConfig, parse_config, read_config, read_document
from unmergeable.merges.mergekit.meaning import meaning_of
from unmergeable.merges.variation import Variation

LAYERS = 5
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.norm.weight",
    "lm_head.weight",
]


def config_of(text: str) -> MergeConfig:
    return parse_config(yaml.safe_load(text))


def two_models(**top: Any) -> dict[str, Any]:
    return {
        "models": [{"model": "a", "parameters": {"weight": 0.25}}, {"model": "b", "parameters": {"weight": 0.5}}],
        "base_model": "base",
        **top,
    }


METHODS: list[tuple[dict[str, Any], Merge]] = [
    ({"merge_method": "linear"}, Linear()),
    ({"merge_method": "linear", "parameters": {"normalize": False, "weight": 1}}, Linear(normalize=False)),
    ({"merge_method": "task_arithmetic"}, TaskArithmetic()),
    ({"merge_method": "ties"}, Ties(trim="tensor", average="weight", undecided="positive")),
    (
        {"merge_method": "ties", "parameters": {"normalize": False, "int8_mask": True}},
        Ties(trim="tensor", average="sum", undecided="positive"),
    ),
    ({"merge_method": "dare_linear"}, DareLinear(rescale="norm")),
    ({"merge_method": "dare_linear", "parameters": {"rescale": False}}, DareLinear(rescale="none")),
    ({"merge_method": "dare_ties"}, DareTies(rescale="norm", average="sum", undecided="positive")),
    ({"merge_method": "della"}, Della(rescale="norm", average="weight", undecided="positive")),
    ({"merge_method": "breadcrumbs"}, Breadcrumbs()),
]


@pytest.mark.parametrize(("top", "method"), METHODS, ids=[repr(method) for _, method in METHODS])
def test_methods_are_run_in_mergekits_variant(top: dict[str, Any], method: Merge) -> None:
    if top["merge_method"] == "linear":
        top = {"parameters": {"weight": 1.0}, **top}
    assert meaning_of(parse_config(two_models(**top))).method == method


def test_defaults_are_mergekits() -> None:
    expected = {
        "ties": {"density": (1.0, 1.0), "scaling_coefficient": 1.0},
        "dare_ties": {"density": (1.0, 1.0), "scaling_coefficient": 1.0},
        "della": {"density": (1.0, 1.0), "epsilon": (0.15, 0.15), "scaling_coefficient": 1.0},
        "dare_linear": {"density": (1.0, 1.0)},
        "breadcrumbs": {"density": (1.0, 1.0), "gamma": (0.01, 0.01)},
        "task_arithmetic": {},
    }
    for method, settings in expected.items():
        vary = meaning_of(parse_config(two_models(merge_method=method))).vary(NAMES)
        assert vary("model.norm.weight") == Variation((0.25, 0.5), settings), method


def test_defaults_are_those_of_the_installed_mergekit() -> None:
    merge_methods = pytest.importorskip("mergekit.merge_methods", reason="mergekit is not installed")
    assert merge_methods.get("ties").spec.parameters  # control
    for method in ("ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "task_arithmetic"):
        config = parse_config(two_models(merge_method=method))
        its = meaning_of(config).vary(NAMES)("model.norm.weight").settings
        known = {spec.name: spec.default for spec in merge_methods.get(method).spec.parameters}
        for number, values in its.items():
            theirs = known["lambda" if number == "scaling_coefficient" else number]
            assert values == theirs if isinstance(values, float) else values == (theirs, theirs), (method, number)


def test_gradients_run_over_the_layers() -> None:
    config = config_of("""
        models:
          - {model: a, parameters: {weight: [0, 1]}}
          - {model: b, parameters: {weight: [1, 0.5, 1e-1]}}
        merge_method: task_arithmetic
        base_model: base
    """)
    vary = meaning_of(config).vary(NAMES)
    coefficients = [vary(f"model.layers.{i}.mlp.up_proj.weight").coefficients for i in range(LAYERS)]
    assert [first for first, _ in coefficients] == [0, 0.25, 0.5, 0.75, 1]  # type: ignore[misc]
    assert [second for _, second in coefficients] == pytest.approx([1, 0.75, 0.5, 0.3, 0.1])  # type: ignore[misc]
    for outside in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert vary(outside).coefficients == (0, 1)


def test_filters_are_looked_up_in_order_and_passed_over() -> None:
    config = config_of("""
        models:
          - model: a
            parameters:
              weight:
                - {filter: self_attn, value: [0, 1]}
                - {filter: mlp, value: 0.7}
          - {model: b}
        merge_method: task_arithmetic
        base_model: base
        parameters:
          weight: [{filter: norm, value: 0.2}, {value: 0.4}]
    """)
    vary = meaning_of(config).vary(NAMES)
    assert vary("model.layers.4.self_attn.q_proj.weight").coefficients == (1.0, 0.4)
    assert vary("model.layers.1.self_attn.q_proj.weight").coefficients == (0.25, 0.4)
    assert vary("model.layers.1.mlp.up_proj.weight").coefficients == (0.7, 0.4)
    assert vary("model.norm.weight").coefficients == (0.2, 0.2)
    assert vary("lm_head.weight").coefficients == (0.4, 0.4)


def test_gradients_and_filters_as_mergekit_evaluates_them() -> None:
    mergekit_config = pytest.importorskip("mergekit.config", reason="mergekit is not installed")
    settings: list[Any] = [
        0.5,
        [0, 1, 0.5],
        [{"filter": "mlp", "value": [1, 0]}, {"filter": "*", "value": 0.3}],
        [{"filter": "nothing", "value": 1}, {"value": [0.2, 0.4, 0.8, 1.6]}],
    ]
    for setting in settings:
        document = two_models(merge_method="task_arithmetic", parameters={"lambda": setting})
        vary = meaning_of(parse_config(document)).vary(NAMES)
        theirs = mergekit_config.MergeConfiguration.model_validate(document).parameters["lambda"]
        for name in NAMES:
            t = int(name.split(".")[2]) / (LAYERS - 1) if ".layers." in name else 0
            factor = mergekit_config.evaluate_setting(name, theirs, t, validate=float)
            assert vary(name).coefficients == pytest.approx((0.25 * factor, 0.5 * factor))


def test_normalize_and_lambda_fold_into_the_coefficients_of_a_sum() -> None:
    parameters = {"normalize": True, "lambda": 1.5}
    config = parse_config(two_models(merge_method="task_arithmetic", parameters=parameters))
    assert meaning_of(config).vary(NAMES)(NAMES[0]).coefficients == pytest.approx((0.5, 1.0))
    elected = parse_config(two_models(merge_method="ties", parameters=parameters))
    assert meaning_of(elected).vary(NAMES)(NAMES[0]) == Variation(
        (0.25, 0.5), {"density": (1.0, 1.0), "scaling_coefficient": 1.5}
    )


def test_who_plays_which_part() -> None:
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("a", "base", "b")]
    ties = meaning_of(parse_config({"models": models, "merge_method": "ties", "base_model": "base"}))
    assert (ties.base, ties.experts) == ("base", ("a", "b"))
    linear = meaning_of(parse_config({"models": models, "merge_method": "linear"}))
    assert (linear.base, linear.experts) == (None, ("a", "base", "b"))
    # mergekit adds a base that is named, and then wants its weight
    document = {"models": models[:1], "merge_method": "linear", "base_model": "base"}
    added = meaning_of(parse_config(document))
    assert (added.base, added.experts) == ("base", ("a", "base"))
    with pytest.raises(BadInput, match="needs weight of base"):
        added.vary(NAMES)(NAMES[0])
    pair = [{"model": "a"}, {"model": "base"}]
    slerp = meaning_of(parse_config({"models": pair, "merge_method": "slerp", "base_model": "base"}))
    assert (slerp.method, slerp.base, slerp.experts) == (Slerp(), None, ("base", "a"))
    stock = {"models": [{"model": "a"}, {"model": "b"}], "merge_method": "model_stock", "base_model": "base"}
    assert meaning_of(parse_config(stock)).method == ModelStock(smallest_norms=1e-6)


def test_slerp_varies_t() -> None:
    config = config_of("""
        slices:
          - sources:
              - {model: base, layer_range: [0, 5]}
              - {model: a, layer_range: [0, 5]}
        merge_method: slerp
        base_model: base
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: 0.5}
        dtype: bfloat16
    """)
    meaning = meaning_of(config)
    assert (meaning.base, meaning.experts) == (None, ("base", "a"))
    vary = meaning.vary(NAMES)
    assert [vary(f"model.layers.{i}.self_attn.q_proj.weight").settings["t"] for i in range(LAYERS)] == [
        0,
        0.5,
        0.3,
        0.7,
        1,
    ]
    assert vary("lm_head.weight") == Variation(settings={"t": 0.5})
    assert config.stored_dtype == "bfloat16"


def test_slices_have_parameters_of_their_own() -> None:
    config = config_of("""
        slices:
          - sources:
              - {model: a, layer_range: [0, 2], parameters: {weight: [0, 1]}}
              - {model: b, layer_range: [0, 2]}
          - sources:
              - {model: b, layer_range: [2, 5], parameters: {weight: 0.9}}
              - {model: a, layer_range: [2, 5], parameters: {weight: [0.1, 0.3]}}
            parameters: {lambda: 2}
        merge_method: task_arithmetic
        base_model: base
        parameters: {weight: 0.5}
    """)
    vary = meaning_of(config).vary(NAMES)
    assert [vary(f"model.layers.{i}.mlp.up_proj.weight").coefficients for i in range(LAYERS)] == [
        (0, 0.5),
        (1, 0.5),
        pytest.approx((0.2, 1.8)),
        pytest.approx((0.4, 1.8)),
        pytest.approx((0.6, 1.8)),
    ]
    assert vary("model.embed_tokens.weight").coefficients == (0, 0.5)  # before the layers: the first slice
    assert vary("model.norm.weight").coefficients == pytest.approx((0.2, 1.8))  # behind them: the last


@pytest.mark.parametrize(
    ("stack", "names"),
    [
        ("transformer.h", ["transformer.wte.weight", "transformer.h.0.attn.weight", "transformer.h.1.attn.weight"]),
        ("encoder.layer", ["embeddings.weight", "encoder.layer.0.a.0.weight", "encoder.layer.1.a.3.weight"]),
        ("decoder.block", ["shared.weight", "decoder.block.0.layer.0.weight", "decoder.block.1.layer.2.weight"]),
    ],
)
def test_layers_are_found_under_other_names(stack: str, names: list[str]) -> None:
    vary = meaning_of(parse_config(two_models(merge_method="ties", parameters={"lambda": [0, 1]}))).vary(names)
    assert [vary(name).settings["scaling_coefficient"] for name in names] == [0, 0, 1]


BROKEN: list[tuple[str, str]] = [
    ("[1, 2]", "must be a mapping"),
    ("{merge_method: ties}", "either models or slices"),
    ("{models: [{model: a}]}", "merge_method is missing"),
    ("{models: [{model: a}], merge_method: tiess}", r"'tiess' is not offered here; did you mean 'ties'\?"),
    ("{models: [{model: a}, {model: b}], merge_method: passthrough}", "one model at a time: 2 are listed"),
    ("{models: [{model: a}], merge_method: ties, base_modle: b}", r"'base_modle'; did you mean 'base_model'\?"),
    ("{models: [{model: a}], merge_method: ties, modules: {}}", "either models or slices"),
    ("{modules: {encoder: {}, decoder: {}}, merge_method: ties}", "only those of one module .* run mergekit"),
    ("{models: [{model: a}], slices: [], merge_method: ties}", "either models or slices"),
    ("{models: [], merge_method: ties}", "at least one entry"),
    ("{models: [a], merge_method: ties}", "models, entry 1: must be a mapping"),
    ("{models: [{modle: a}], merge_method: ties}", r"'modle'; did you mean 'model'\?"),
    ("{models: [{parameters: {}}], merge_method: ties}", "entry 1: model is missing"),
    ("{models: [{model: {path: a}}], merge_method: ties}", "model must be text"),
    ("{models: [{model: a, parameters: {wieght: 1}}], merge_method: ties}", r"'wieght'; did you mean 'weight'\?"),
    ("{models: [{model: a, parameters: {gamma: 1}}], merge_method: ties}", "no parameter of ties is called 'gamma'"),
    ("{models: [{model: a, parameters: {weight: heavy}}], merge_method: ties}", "must be a number or a list"),
    ("{models: [{model: a, parameters: {weight: true}}], merge_method: ties}", "must be a number"),
    ("{models: [{model: a, parameters: {weight: []}}], merge_method: ties}", "must be a number"),
    ("{models: [{model: a, parameters: {weight: [{filter: mlp}]}}], merge_method: ties}", "a filter needs a value"),
    ("{models: [{model: a, parameters: {weight: [{fliter: m, value: 1}]}}], merge_method: ties}", "'fliter'"),
    ("{models: [{model: a}], merge_method: ties, parameters: {normalize: maybe}}", "must be true or false"),
    ("{models: [{model: a, parameters: {normalize: true}}], merge_method: ties, base_model: b}", "at the top"),
    ("{models: [{model: a, parameters: {lambda: 2}}], merge_method: ties}", "lambda is shared by all models"),
    ("{models: [{model: a}], merge_method: ties, dtype: int8}", "dtype: must be one of bfloat16"),
    (
        "{models: [{model: a}], merge_method: ties, tokenizer: {source: base, pad_to_multiple_of: 8}}",
        "not offered here",
    ),
    ("{models: [{model: a}], merge_method: ties, tokenizer: {sauce: base}}", r"'sauce'; did you mean 'source'\?"),
    ("{models: [{model: a}], merge_method: ties, tokenizer: {}, tokenizer_source: base}", "either tokenizer_source or"),
    ("{models: [{model: a}], merge_method: ties, tokenizer: {tokens: {x: {source: {kind: one}}}}}", "source must be a"),
    ("{models: [{model: a}], merge_method: ties, tokenizer: {tokens: {x: {source: a, force: 1}}}}", "true or false"),
    ("{models: [{model: a}], merge_method: ties, base_model: b, tokenizer_source: c}", "c is none of the models"),
    ("{models: [{model: a}, {model: a}], merge_method: ties}", "a is listed twice"),
    ("{models: [{model: a}], merge_method: ties}", "base_model is missing"),
    ("{models: [{model: a}], merge_method: slerp}", "name the two"),
    ("{slices: [{sources: [{model: a}]}], merge_method: ties}", "layer_range must be two whole numbers"),
    ("{slices: [{sources: [{model: a, layer_range: [1, 3]}]}], merge_method: ties}", "base_model is missing"),
    (
        "{slices: [{sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [1, 3]}]}], merge_method: ties}",
        "the same number of layers",
    ),
    (
        "{slices: [{sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [1, 4]}]}], merge_method: ties, "
        "base_model: c}",
        "c, the base_model, is to be a source of each slice",
    ),
    ("{slices: [{sources: [{model: a, layer_range: [0, 3]}], residual_weight: 1}], merge_method: ties}", "residual"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=[text for text, _ in BROKEN])
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        meaning_of(config_of(text))
    assert "\n" not in str(caught.value)


def test_refuses_slices_that_are_not_the_whole_model() -> None:
    document = "{slices: [{sources: [{model: a, layer_range: [0, 3]}]}], merge_method: ties, base_model: b}"
    with pytest.raises(BadInput, match=r"the slices cover layers 0 to 3, but the models have 5 under model.layers"):
        meaning_of(config_of(document)).vary(NAMES)


def test_a_missing_weight_is_missed() -> None:
    vary = meaning_of(config_of("{models: [{model: a}], merge_method: ties, base_model: b}")).vary(NAMES)
    with pytest.raises(BadInput, match=r"ties needs weight of a for tensor lm_head.weight"):
        vary("lm_head.weight")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "not valid YAML"),
        ("{dtype: a, dtype: b}", "key 'dtype' is given twice"),
        ("just text", "holds str"),
        ("!!python/object/apply:os.system [true]", "not valid YAML"),
        ("{models: [{model: a}], merge_method: tiess}", "did you mean"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_anchors_and_merge_keys_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("""
        models:
          - model: a
            parameters: &shared {weight: 0.5, density: 0.25}
          - model: b
            parameters: {<<: *shared, weight: 1}
        merge_method: ties
        base_model: base
    """)
    assert meaning_of(read_config(path)).vary(NAMES)(NAMES[0]) == Variation(
        (0.5, 1.0), {"density": (0.25, 0.25), "scaling_coefficient": 1.0}
    )
    with pytest.raises(BadInput, match="cannot be read"):
        read_config(tmp_path / "missing.yaml")


def test_a_gradient_between_its_points() -> None:
    gradient = Filtered((0.0, 1.0, 0.0))
    assert [gradient.at(t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]
    assert Filtered((3.0,)).at(0.7) == 3


def test_what_aliases_repeat_is_looked_at_once(tmp_path: Path) -> None:
    """Forty lists of twice the one before: written out, 2^40 entries."""
    lines = ["a0: &a0 {model: {model: {path: ./mine}}}", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 41))]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(lines))
    document = read_document(path)
    assert document["a0"] == {"model": "./mine"}
    inner = document["a40"]
    for _ in range(40):
        inner = inner[1]
    assert inner is document["a0"]
