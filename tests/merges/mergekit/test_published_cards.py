"""Shapes of published model cards: one file is one merge to this package and to mergekit, or one line says why not.

The shapes are those of configurations that people put beside their merges; the models are tiny. Where mergekit draws
masks, the two cannot agree weight by weight: there, what fraction of the weights moved, layer by layer, is compared
with the densities that the file gives that layer.
"""

from __future__ import annotations

import copy
import json
import re
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from merges.networks_on_disk import tokenizer_document
from unmergeable import ops
from unmergeable.errors import UnmergeableError
from unmergeable.merges.mergekit.config import read_document
from unmergeable.merges.mergekit.documents import absolute_paths, with_donor

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft, under mergekit

LAYERS, HIDDEN, ROWS = 4, 32, 9
TOKENS = {letter: row for row, letter in enumerate("abcdefghi")}
TEMPLATES = {"base": "{{ 'base' }}", "a": "{{ 'chat' }}", "b": "{{ 'chat' }}\n"}

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes of it with chat templates of their own, an adapter on the base, and one of other depth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)

    def llama(name: str, like: State | None = None, layers: int = LAYERS) -> State:
        config = LlamaConfig(
            vocab_size=ROWS,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
        network = LlamaForCausalLM(config)
        old = like or {key: torch.zeros_like(value) for key, value in network.state_dict().items()}
        size = 0.2 if like is None else 0.02
        state = {
            key: value + size * torch.randn(value.shape, generator=generator) for key, value in sorted(old.items())
        }
        network.load_state_dict(state)
        network.save_pretrained(folder / name)
        document = tokenizer_document(TOKENS) | {"pre_tokenizer": {"type": "Whitespace"}}
        (folder / name / "tokenizer.json").write_text(json.dumps(document))
        tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATES.get(name)}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        return state

    base = llama("base")
    llama("a", base)
    llama("b", base)
    llama("shallow", layers=2)
    adapter = folder / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folder / "base")}))
    shapes = {"A": (2, HIDDEN), "B": (HIDDEN, 2)}
    update = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.randn(
            shape, generator=generator
        )
        for layer in range(LAYERS)
        for side, shape in shapes.items()
    }
    save_file(update, adapter / "adapter_model.safetensors", {"format": "pt"})
    return folder


def weights(folder: Path) -> State:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def by_this_package(document: dict[str, Any], models: Path, out: Path) -> Path:
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(absolute_paths(document, models)))
    ops.merge(config=config, out=out)
    return out


def by_mergekit(document: dict[str, Any], models: Path, out: Path) -> Path:
    merge = pytest.importorskip("mergekit.merge", reason="mergekit is not installed")
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(with_donor(absolute_paths(document, models)))
    options = MergeOptions(copy_tokenizer=True, quiet=True, write_model_card=False, lora_merge_cache=str(out) + "-lora")
    merge.run_merge(config, str(out), options)
    return out


def model(name: str, **parameters: Any) -> dict[str, Any]:
    return {"model": name, **({"parameters": parameters} if parameters else {})}


def layers(name: str, first: int, stop: int, **parameters: Any) -> dict[str, Any]:
    return {**model(name, **parameters), "layer_range": [first, stop]}


def pieces(*sources: dict[str, Any]) -> list[dict[str, Any]]:
    """One slice for each source."""
    return [{"sources": [source]} for source in sources]


WHOLE = [{"sources": [layers("a", 0, LAYERS), layers("b", 0, LAYERS)]}]
T = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}]
NEW_BLOCK = {"scale": [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]}
SINGLE = {"dtype": "float32", "out_dtype": "bfloat16"}

CARDS: dict[str, dict[str, Any]] = {
    "slerp over slices, t by filter": {
        "slices": WHOLE,
        "merge_method": "slerp",
        "base_model": "a",
        "parameters": {"t": [*T, {"value": 0.5}]},
        "dtype": "bfloat16",
    },
    "slerp over slices, the base second, union of tokens": {
        "slices": WHOLE,
        "merge_method": "slerp",
        "base_model": "b",
        "parameters": {"t": [*T, {"value": 0.5}]},
        "tokenizer_source": "union",
        "dtype": "float16",
    },
    "slerp, the base not listed": {
        "models": [model("a")],
        "merge_method": "slerp",
        "base_model": "base",
        "parameters": {"t": 0.45},
        "dtype": "float32",
    },
    "slerp of a long gradient": {
        "models": [model("a"), model("b")],
        "merge_method": "slerp",
        "base_model": "a",
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0.5, 0.3, 0.7, 0.5, 0.7, 0.3, 0.5, 0.3, 0.7, 0.5, 0.7, 0.3, 0.5]},
                {"filter": "embed_tokens", "value": 0.1},
                {"filter": "lm_head", "value": 0.9},
                {"value": 0.5},
            ],
            "int8_mask": True,
        },
        **SINGLE,
    },
    "slerp, each slice with a base of its own": {
        "slices": [
            {"sources": [layers("a", 0, 2), layers("b", 0, 2)], "base_model": "a", "parameters": {"t": 0.2}},
            {"sources": [layers("a", 2, 4), layers("b", 2, 4)], "base_model": "b", "parameters": {"t": [0.1, 0.6]}},
        ],
        "merge_method": "slerp",
        "base_model": "a",
        "dtype": "float32",
    },
    "linear of three, all of one weight": {
        "name": "an average",
        "models": [model(name, weight=1.0) for name in ("base", "a", "b")],
        "merge_method": "linear",
        "tokenizer_source": "union",
        "dtype": "float16",
    },
    "linear of checkpoints of one run, the last as the base": {
        "models": [model("base", weight=1), model("a", weight=2), model("b", weight=3)],
        "merge_method": "linear",
        "base_model": "b",
        "parameters": {"normalize": True},
        **SINGLE,
    },
    "linear, models that take turns": {
        "slices": [
            {"sources": [layers("a", 0, 1, weight=1)]},
            {"sources": [layers("a", 1, 3, weight=[0.8, 0.2]), layers("b", 0, 2, weight=0.5)]},
            {"sources": [layers("b", 3, 4, weight=1)]},
        ],
        "merge_method": "linear",
        "dtype": "float32",
    },
    "task arithmetic as mergekit writes it": {
        "base_model": "base",
        "dtype": "bfloat16",
        "merge_method": "task_arithmetic",
        "parameters": {"normalize": 0.0, "lambda": 0.57, "int8_mask": 1.0},
        "slices": [
            {
                "sources": [
                    layers("base", 0, LAYERS),
                    layers("a", 0, LAYERS, weight=0.5),
                    layers("b", 0, LAYERS, weight=0.5),
                ]
            }
        ],
    },
    "task arithmetic in modules": {
        "base_model": "base",
        "merge_method": "task_arithmetic",
        "modules": {
            "default": {
                "slices": [
                    {
                        "sources": [
                            layers("a", 0, LAYERS, weight=[0.9, 0.2, 0.2, 0.95]),
                            layers("b", 0, LAYERS),
                            layers("base", 0, LAYERS),
                        ]
                    }
                ],
                "parameters": {"weight": 0.3},
            }
        },
        "parameters": {"lambda": 1.0, "normalize": 1.0, "weight": 7},
        "tokenizer": {},
        "dtype": "float32",
    },
    "ties, the base listed without parameters": {
        "models": [model("base"), model("a", density=0.5, weight=0.4), model("b", density=0.5, weight=0.3)],
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"normalize": True, "int8_mask": True},
        **SINGLE,
    },
    "ties with gradients and filters": {
        "models": [
            model("a", density=[1, 0.7, 0.1], weight=1.0),
            model("b", density=0.33, weight=[{"filter": "mlp", "value": 0.5}, {"value": 0}]),
        ],
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"normalize": False, "lambda": 1.1},
        "dtype": "float32",
    },
    "ties over slices at other depths": {
        "slices": [
            {"sources": [layers("base", 0, 2), layers("a", 0, 2, weight=1), layers("b", 1, 3, weight=0.5)]},
            {"sources": [layers("b", 1, 3, weight=0.3), layers("base", 1, 3), layers("a", 2, 4, weight=0.2)]},
        ],
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"density": [0.4, 0.8]},
        "dtype": "float32",
    },
    "breadcrumbs": {
        "models": [model("a", weight=0.5), model("b", weight=0.7)],
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "parameters": {"lambda": 0.5, "density": 0.9, "gamma": 0.01},
        "dtype": "float32",
    },
    "breadcrumbs_ties, each model in layers of its own": {
        "models": [
            model("a", gamma=0.01, density=0.9, weight=[0.33, 0.0825, 0.0825, 0.0825, 0.0825]),
            model("b", gamma=0.02, density=0.9, weight=[0.0825, 0.33, 0.0825, 0.0825, 0.0825]),
        ],
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "parameters": {"normalize": False, "int8_mask": True},
        "dtype": "float32",
    },
    "model_stock over slices": {
        "slices": [{"sources": [layers(name, 0, LAYERS) for name in ("base", "a", "b")]}],
        "merge_method": "model_stock",
        "base_model": "base",
        "dtype": "float32",
        "out_dtype": "float16",
    },
    "model_stock of adapters": {
        "models": [model("a"), model("base+adapter"), model("b")],
        "merge_method": "model_stock",
        "base_model": "base",
        "dtype": "float32",
    },
    "nuslerp, weights by layer": {
        "models": [model("a", weight=[0.1, 0.3, 0.1]), model("b", weight=[0.9, 0.7, 0.9])],
        "merge_method": "nuslerp",
        "tokenizer": {"source": "b"},
        **SINGLE,
    },
    "nuslerp of task vectors": {
        "models": [model("a", weight=0.4), model("b", weight=0.6)],
        "merge_method": "nuslerp",
        "base_model": "base",
        "parameters": {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        "dtype": "float32",
    },
    "karcher with limits of its own": {
        "models": [model("base"), model("a"), model("b")],
        "merge_method": "karcher",
        "parameters": {"max_iter": 3, "tol": "1e-9"},
        "dtype": "float32",
    },
    "sce": {
        "models": [model("a"), model("b")],
        "merge_method": "sce",
        "base_model": "base",
        "parameters": {"select_topk": 0.15},
        "dtype": "float32",
    },
    "multislerp": {
        "models": [model("a", weight=0.6), model("b", weight=0.4)],
        "merge_method": "multislerp",
        "base_model": "base",
        "dtype": "float32",
    },
    "nearswap": {
        "models": [model("a")],
        "merge_method": "nearswap",
        "base_model": "base",
        "parameters": {"t": 0.01},
        "dtype": "float32",
    },
    "layers of two models stacked": {
        "slices": pieces(layers("a", 0, 3), layers("b", 1, 4)),
        "merge_method": "passthrough",
        "dtype": "bfloat16",
    },
    "one model's layers repeated": {
        "slices": pieces(layers("a", 0, 2), layers("a", 1, 3), layers("a", 1, 3), layers("a", 2, 4)),
        "merge_method": "passthrough",
        "dtype": "float16",
    },
    "layers left out": {
        "slices": pieces(layers("a", 0, 2), layers("a", 3, 4)),
        "merge_method": "passthrough",
        "dtype": "bfloat16",
    },
    "the end left out": {"slices": pieces(layers("b", 0, 3)), "merge_method": "passthrough"},
    "new blocks that add nothing yet": {
        "slices": pieces(layers("a", 0, 2), layers("a", 1, 2, **NEW_BLOCK), layers("a", 2, 4)),
        "merge_method": "passthrough",
        "dtype": "bfloat16",
    },
    "stacked, with the base's files": {
        "slices": pieces(layers("a", 0, 2), layers("b", 0, 4)),
        "merge_method": "passthrough",
        "base_model": "base",
        "tokenizer_source": "base",
        "parameters": {"scale": 0.7},
        "dtype": "float32",
    },
    "one model, in another precision": {
        "models": [model("a", weight=1.0)],
        "merge_method": "linear",
        "dtype": "bfloat16",
    },
    "one model, trimmed": {
        "models": [model("base"), model("a", weight=0.6, density=0.5)],
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"normalize": False},
        "dtype": "float32",
    },
    "one model, without its outliers": {
        "models": [model("a", weight=1.0, density=0.6, gamma=0.05)],
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "dtype": "float32",
    },
    "an adapter put into its base": {
        "base_model": "base+adapter",
        "models": [model("base+adapter")],
        "merge_method": "passthrough",
        "dtype": "float32",
    },
}


def assert_same(ours: Path, theirs: Path, arithmetic: torch.dtype) -> None:
    """Both compute sums and turns of numbers below 1, in another order, in ``arithmetic`` (here at least float32)."""
    one, other = weights(ours), weights(theirs)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        expected = other[name]
        assert tensor.dtype == expected.dtype, name
        rtol = torch.finfo(tensor.dtype).eps
        atol = 8 * torch.finfo(arithmetic).eps * float(expected.float().abs().max())
        assert torch.allclose(tensor.float(), expected.float(), atol=atol, rtol=rtol), name


@pytest.mark.parametrize("document", CARDS.values(), ids=CARDS)
def test_one_merge(document: dict[str, Any], models: Path, tmp_path: Path) -> None:
    theirs = by_mergekit(document, models, tmp_path / "mergekit")
    ours = by_this_package(document, models, tmp_path / "own")
    assert_same(ours, theirs, getattr(torch, document.get("dtype", "float32")))
    assert config_of(ours)["num_hidden_layers"] == config_of(theirs)["num_hidden_layers"]
    vocabularies = [json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"] for folder in (ours, theirs)]
    assert vocabularies[0] == vocabularies[1]


def test_another_merge_is_noticed(models: Path, tmp_path: Path) -> None:
    """Control: the comparison tells a t of 0.45 from one of 0.44."""
    card = CARDS["slerp, the base not listed"]
    theirs = by_mergekit(card, models, tmp_path / "mergekit")
    ours = by_this_package({**card, "parameters": {"t": 0.44}}, models, tmp_path / "own")
    with pytest.raises(AssertionError):
        assert_same(ours, theirs, torch.float32)


DRAWN: dict[str, tuple[dict[str, Any], list[list[float]]]] = {
    "dare_ties": (
        {
            "models": [model("base"), model("a", density=0.53, weight=0.4), model("b", density=0.3, weight=0.3)],
            "merge_method": "dare_ties",
            "base_model": "base",
            "parameters": {"int8_mask": True},
            **SINGLE,
        },
        [[0.53] * 4, [0.3] * 4],
    ),
    "dare_ties with gradients, the base weighed too": (
        {
            "models": [
                model("base", weight=0.2),
                model("a", density=[0.8, 0.2], weight=0.2),
                model("b", density=[0.1, 0.4, 0.1], weight=[0.2, 0.4]),
            ],
            "merge_method": "dare_ties",
            "base_model": "base",
            "parameters": {"rescale": False, "lambda": 1.0},
            "dtype": "float32",
            "tokenizer": {"source": "union"},
        },
        [[0.8, 0.6, 0.4, 0.2], [0.1, 0.3, 0.3, 0.1]],
    ),
    "dare_linear over slices": (
        {
            "slices": [{"sources": [layers("base", 0, LAYERS), layers("a", 0, LAYERS), layers("b", 0, LAYERS)]}],
            "merge_method": "dare_linear",
            "base_model": "base",
            "parameters": {"weight": 0.5, "density": [0.2, 0.5]},
            "dtype": "float32",
        },
        [[0.2, 0.3, 0.4, 0.5]] * 2,
    ),
    "della": (
        {
            "models": [model("a", weight=0.27, density=0.5), model("b", weight=0.23, density=0.6)],
            "merge_method": "della",
            "base_model": "base",
            "parameters": {"epsilon": 0.1, "lambda": 1.0, "normalize": False, "int8_mask": True},
            "dtype": "float32",
        },
        [[0.5] * 4, [0.6] * 4],
    ),
    "della_linear in modules": (
        {
            "base_model": "base",
            "dtype": "float32",
            "merge_method": "della_linear",
            "modules": {
                "default": {
                    "slices": [
                        {
                            "sources": [
                                layers("a", 0, LAYERS, density=0.5, epsilon=0.4, weight=[0.9, 0.2, 0.8]),
                                layers("b", 0, LAYERS, density=0.3, epsilon=0.2, weight=[0.1, 0.9, 0.3]),
                                layers("base", 0, LAYERS),
                            ]
                        }
                    ]
                }
            },
            "parameters": {"lambda": 1.0, "normalize": 1.0},
            "tokenizer": {},
        },
        [[0.5] * 4, [0.3] * 4],
    ),
}


@pytest.mark.parametrize(("document", "densities"), DRAWN.values(), ids=DRAWN)
def test_as_many_weights_move(
    document: dict[str, Any], densities: list[list[float]], models: Path, tmp_path: Path
) -> None:
    """A weight stays where every model's mask drops it: with densities d the share (1 - d1) (1 - d2)."""
    document = {**document, "out_dtype": "float32"}
    merged, base = weights(by_this_package(document, models, tmp_path / "own")), weights(models / "base")
    for layer in range(LAYERS):
        names = [name for name in base if f".layers.{layer}." in name and name.endswith("_proj.weight")]
        still = sum(int((merged[name] == base[name]).sum()) for name in names)
        count = sum(base[name].numel() for name in names)
        expected = (1 - densities[0][layer]) * (1 - densities[1][layer])
        assert abs(still / count - expected) < 5 * sqrt(expected * (1 - expected) / count), layer


def test_stacked_layers_load_and_run(models: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = by_this_package(CARDS["layers of two models stacked"], models, tmp_path / "own")
    network, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert network.config.num_hidden_layers == 6
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert bool(network(torch.arange(5)[None]).logits.isfinite().all())


CHOSEN = {
    "auto": ("auto", "{{ 'chat' }}"),  # of three models, two have it
    "written out": ("{{ messages }}", "{{ messages }}"),
}


@pytest.mark.parametrize(("named", "expected"), CHOSEN.values(), ids=CHOSEN)
def test_chat_templates(named: str, expected: str, models: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    document = {**CARDS["ties, the base listed without parameters"], "chat_template": named}
    ours = AutoTokenizer.from_pretrained(by_this_package(document, models, tmp_path / "own"))
    assert ours.chat_template == expected


def test_a_chat_template_by_name(models: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    pytest.importorskip("mergekit", reason="mergekit is not installed")
    document = {**CARDS["sce"], "chat_template": "chatml"}
    found = [
        AutoTokenizer.from_pretrained(merge(document, models, tmp_path / merge.__name__)).chat_template.strip()
        for merge in (by_this_package, by_mergekit)
    ]
    assert found[0] == found[1]


PAIR = {"models": [model("a", weight=0.5), model("b", weight=0.5)], "base_model": "base"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "slerp without a base": (
        {"models": [model("a"), model("b")], "merge_method": "slerp", "parameters": {"t": 0.5}},
        "name the two",
    ),
    "slerp of three": ({**PAIR, "merge_method": "slerp", "parameters": {"t": 1}}, "weight'; leave it out"),
    "parameters beside the model": (
        {"models": [{"model": "a", "weight": 0.6, "density": 0.5}], "merge_method": "ties", "base_model": "base"},
        "'(weight|density)'; it is a parameter: put it under parameters",
    ),
    "a setting of the file among parameters": (
        {**PAIR, "merge_method": "ties", "parameters": {"dtype": "bfloat16"}},
        "'dtype'; it stands at the top of the file",
    ),
    "weights that do nothing": (
        {"models": [model("a", weight=2)], "merge_method": "model_stock", "base_model": "base"},
        r"no parameter of model_stock is called 'weight'; leave it out",
    ),
    "a revision": (
        {"slices": pieces({**layers("a", 0, 3), "revision": "v1"}), "merge_method": "passthrough"},
        "'revision'; download that revision",
    ),
    "more layers than there are": (
        {"slices": pieces(layers("a", 0, 2), layers("shallow", 1, 4)), "merge_method": "passthrough"},
        r"\[1, 4\] ends behind the 2 layers of .*shallow: let it end at 2 at most",
    ),
    "ranges of other lengths": (
        {"slices": [{"sources": [layers("a", 0, 2), layers("b", 0, 3)]}], "merge_method": "slerp", "base_model": "a"},
        "the same number of layers",
    ),
    "two models in one slice": ({"slices": WHOLE, "merge_method": "passthrough"}, "one model at a time: 2"),
    "as many models in each slice": (
        {
            "slices": [
                {"sources": [layers("base", 0, 2), layers("a", 0, 2)]},
                {"sources": [layers(name, 2, 4) for name in ("base", "a", "b")]},
            ],
            "merge_method": "karcher",
        },
        "list as many in each",
    ),
    "a residual": ({"slices": [{**WHOLE[0], "residual_weight": 0.5}], "merge_method": "linear"}, "residual_weight"),
    "experts of a mixture": (
        {"base_model": "base", "gate_mode": "hidden", "dtype": "bfloat16", "experts": []},
        "run mergekit-moe",
    ),
    "a search for a merge": (
        {"genome": {"models": ["a", "b"], "merge_method": "ties", "base_model": "base"}, "tasks": [{"name": "gsm8k"}]},
        "run mergekit-evolve with it, and give the best_config.yaml that it writes",
    ),
    "a key that nobody reads": (
        {**PAIR, "merge_method": "ties", "random_seed": 0},
        r"no key is called 'random_seed'; leave it out \(mergekit passes over it\)",
    ),
    "a typo": ({**PAIR, "merge_method": "ties", "out_dtpe": "float32"}, "'out_dtpe'; did you mean 'out_dtype'"),
    "a revision in the long form": (
        {"models": [{"model": {"model": {"path": "a", "revision": "v1"}}}], "merge_method": "linear"},
        "'revision'; download that revision",
    ),
    "a long form without a path": (
        {"models": [{"model": {"model": 3}}], "merge_method": "linear"},
        "model, model: must name a folder",
    ),
    "an unknown chat template": ({**PAIR, "merge_method": "ties", "chat_template": "vicuna"}, "'vicuna' is neither"),
    "a name on the hub": ({"models": [model("org/name")], "merge_method": "karcher"}, "download the model"),
    "no sparser than all": (
        {**PAIR, "merge_method": "ties", "parameters": {"density": 1.5}},
        r"density=1.5: must lie in \(0, 1\]",
    ),
    "no base_model": ({"models": [model("a", weight=1)], "merge_method": "dare_ties"}, "base_model is missing"),
}


@pytest.mark.parametrize(("document", "message"), REFUSED.values(), ids=REFUSED)
def test_one_line_says_what_to_change(document: dict[str, Any], message: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(UnmergeableError) as caught:
        by_this_package(document, models, tmp_path / "own")
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "own").exists()


def test_models_in_the_long_form(models: Path, tmp_path: Path) -> None:
    """Cards of early 2024 name models as mappings of paths. mergekit reads both forms as the same model."""
    short = {
        "base_model": "base",
        "models": [model("base+adapter", weight=0.5), model("a", weight=0.7)],
        "merge_method": "task_arithmetic",
        "tokenizer": {"source": "a", "tokens": {"c": {"source": {"kind": "model_token", "model": "a", "token": "d"}}}},
        "dtype": "float32",
    }
    path = {name: {"path": str(models / name)} for name in ("base", "a", "adapter")}
    long = copy.deepcopy(short)
    long["base_model"] = {"model": path["base"] | {"revision": None}}
    long["models"][0]["model"] = {"model": path["base"], "lora": path["adapter"]}
    long["models"][1]["model"] = {"model": str(models / "a")}
    long["tokenizer"]["source"] = long["tokenizer"]["tokens"]["c"]["source"]["model"] = {"model": path["a"]}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(long))

    ops.merge(config=tmp_path / "long.yaml", out=tmp_path / "long")
    expected = by_this_package(short, models, tmp_path / "short")
    assert (tmp_path / "long" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    other = by_this_package({**short, "models": short["models"][1:]}, models, tmp_path / "other")
    assert (other / "model.safetensors").read_bytes() != (expected / "model.safetensors").read_bytes(), "the control"

    config = pytest.importorskip("mergekit.config", reason="mergekit is not installed")
    theirs = [
        config.MergeConfiguration.model_validate(document)
        for document in (long, absolute_paths(read_document(tmp_path / "long.yaml"), models))
    ]
    assert theirs[0].referenced_models() == theirs[1].referenced_models()


def test_a_base_may_be_an_adapter_on_its_base(models: Path, tmp_path: Path) -> None:
    """Named after ``--base`` and in a file it is the same; adapters among the experts lie on the same base."""
    base, adapter = models / "base", models / "adapter"
    document = {
        "models": [model("a", weight=0.5), model("base+adapter", weight=0.25)],
        "base_model": "base+adapter",
        "merge_method": "task_arithmetic",
    }
    by_file = weights(by_this_package(document, models, tmp_path / "file"))
    experts = [(models / "a", 0.5), (adapter, 0.25)]
    ops.merge(base=f"{base}+{adapter}", experts=experts, method="task_arithmetic", out=tmp_path / "options")
    by_options = weights(tmp_path / "options")
    assert all(torch.equal(tensor, by_options[name]) for name, tensor in by_file.items())
    ops.merge(base=base, experts=experts, method="task_arithmetic", out=tmp_path / "plain")
    assert any(not torch.equal(tensor, by_file[name]) for name, tensor in weights(tmp_path / "plain").items()), (
        "control"
    )


def test_several_documents(models: Path, tmp_path: Path) -> None:
    config = tmp_path / "merges.yaml"
    config.write_text("name: first\nmerge_method: linear\nmodels: []\n---\nmerge_method: slerp\nmodels: []\n")
    with pytest.raises(UnmergeableError, match="write each into a file of its own") as caught:
        ops.merge(config=config, out=tmp_path / "own")
    assert "\n" not in str(caught.value)
