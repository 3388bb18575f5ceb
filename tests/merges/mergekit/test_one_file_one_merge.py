"""One configuration file means one merge, whoever merges: precisions, vocabularies, and what tools leave in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merges.networks_on_disk import EMBEDDING, tokenizer_document
from unmergeable import ops

pytestmark = pytest.mark.slow

TOKENS = {letter: row for row, letter in enumerate("abcdefghi")}


def llama(folder: Path, seed: int, tokens: dict[str, int], rows: int, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny tied Llama of 32 dimensions, with a tokenizer that transformers reads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    document = tokenizer_document(tokens) | {"pre_tokenizer": {"type": "Whitespace"}}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def both(folder: Path, document: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The merge of a configuration by this package and by mergekit."""
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    config = folder / "merge.yaml"
    config.write_text(json.dumps(document))
    found = []
    for backend in ("own", "mergekit"):
        ops.merge(config=config, backend=backend, out=folder / backend)  # type: ignore[arg-type]
        tensors = {n: t for path in (folder / backend).glob("*.safetensors") for n, t in load_file(path).items()}
        found.append({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    return found[0], found[1]


def document_of(method: str, **more: Any) -> dict[str, Any]:
    models = [{"model": name} for name in ("a", "b")]
    shared = {"base_model": "base", "parameters": {"weight": 0.5}, "dtype": "float32"}
    return {"merge_method": method, "models": models, **shared, **more}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        # Both compute in float32 a few sums of numbers below 1, and round once.
        step = torch.finfo(tensor.dtype).eps
        near = 8 * torch.finfo(torch.float32).eps
        assert torch.allclose(tensor.float(), theirs[name].float(), atol=near, rtol=step), name


CHOICES: dict[str, dict[str, Any]] = {
    "base": {"tokenizer_source": "base"},
    "union": {"tokenizer_source": "union"},
    "an expert": {"tokenizer_source": "b"},
    "single tokens": {
        "tokenizer": {
            "source": "union",
            "tokens": {
                "<x>": {"source": {"kind": "zero"}},
                "<y>": {"source": "b", "force": True},
                "a": {"source": {"kind": "model_token", "model": "a", "token": "b"}, "force": True},
            },
        }
    },
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_tokenizers(method: str, choice: dict[str, Any], tmp_path: Path) -> None:
    llama(tmp_path / "base", 0, TOKENS, 12)  # three rows of padding
    llama(tmp_path / "a", 1, TOKENS | {"<x>": 9, "<y>": 10}, 11)
    llama(tmp_path / "b", 2, TOKENS | {"<y>": 9, "<z>": 10}, 16)
    ours, theirs = both(tmp_path, document_of(method, **choice))
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["vocab_size"] == ours[EMBEDDING].shape[0]
    from transformers import AutoTokenizer

    own, other = (AutoTokenizer.from_pretrained(tmp_path / folder).get_vocab() for folder in ("own", "mergekit"))
    assert own.keys() == other.keys()
    # mergekit numbers the tokens that it adds in the order of a set of models, which differs from run to run.
    rows = torch.tensor([other[token] for token in sorted(own, key=own.__getitem__)])
    theirs[EMBEDDING] = theirs[EMBEDDING][rows]
    assert_same(ours, theirs)


@pytest.mark.parametrize("stored", [{}, {"out_dtype": "bfloat16"}, {"out_dtype": "float16"}], ids=str)
def test_precisions(stored: dict[str, str], tmp_path: Path) -> None:
    llama(tmp_path / "base", 0, TOKENS, 9, torch.bfloat16)
    llama(tmp_path / "a", 1, TOKENS, 9, torch.float16)
    llama(tmp_path / "b", 2, TOKENS, 9, torch.float32)
    assert_same(*both(tmp_path, document_of("task_arithmetic", **stored)))


def test_without_a_dtype_both_store_as_the_base(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        llama(tmp_path / name, seed, TOKENS, 9, torch.bfloat16 if name == "base" else torch.float32)
    document = document_of("linear")
    document.pop("dtype")
    ours, theirs = both(tmp_path, document)
    assert {tensor.dtype for tensor in (*ours.values(), *theirs.values())} == {torch.bfloat16}


def test_a_head_stored_twice(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        folder = llama(tmp_path / name, seed, TOKENS, 9)
        if name != "b":
            tensors = load_file(folder / "model.safetensors")
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_same(*both(tmp_path, document_of("task_arithmetic")))


def test_layers_stacked(tmp_path: Path) -> None:
    """mergekit's merge of another depth is accepted where it holds what the slices say."""
    for seed, name in enumerate("ab"):
        llama(tmp_path / name, seed, TOKENS, 9)
    sources = [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [1, 2]}]
    slices = [{"sources": [source]} for source in sources]
    ours, theirs = both(tmp_path, {"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"})
    assert len({name.split(".")[2] for name in ours if ".layers." in name}) == 3
    assert_same(ours, theirs)
