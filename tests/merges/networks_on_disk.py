"""Small language models by the names that files have, to be saved in the ways that people's tools save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from merges.small_models import write_checkpoint
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.merges import Merge, TaskArithmetic, merge
from unmergeable.merges.networks import Template
from unmergeable.merges.vocabularies import Tokenizer

State = dict[str, Tensor]

HIDDEN, ROWS = 4, 9
CONFIG: dict[str, object] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": ROWS,
    "tie_word_embeddings": True,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def language_model(seed: int, *, rows: int = ROWS) -> State:
    """The tensors of a tied language model of two layers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layer = {"self_attn.q_proj.weight": (HIDDEN, HIDDEN), "mlp.up_proj.weight": (6, HIDDEN), "input_norm.weight": (4,)}
    state = {EMBEDDING: normal(rows, HIDDEN), "model.norm.weight": normal(HIDDEN)}
    return state | {
        f"model.layers.{number}.{name}": normal(*shape) for number in range(2) for name, shape in layer.items()
    }


def write(folder: Path, state: State, tokens: dict[str, int] | None = None, **config: object) -> Path:
    """A checkpoint folder, its tokens in a ``tokenizer.json``; those in angle brackets are added ones."""
    write_checkpoint(folder, {name: tensor.contiguous() for name, tensor in state.items()}, config=CONFIG | config)
    if tokens is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_document(tokens)))
    return folder


def tokenizer_document(tokens: dict[str, int]) -> dict[str, Any]:
    added = [
        {"id": row, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for token, row in tokens.items()
        if token.startswith("<")
    ]
    own = {token: row for token, row in tokens.items() if not token.startswith("<")}
    return {"version": "1.0", "added_tokens": added, "model": {"type": "WordLevel", "vocab": own, "unk_token": "a"}}


def merged(
    base: Path | None,
    experts: list[Path],
    out: Path,
    *,
    method: Merge | None = None,
    template: Template = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> State:
    """The merge of folders, half of each task vector; its notes are in :func:`notes_of`."""
    merge(
        None if base is None else open_checkpoint(base),
        [(open_checkpoint(expert), 0.5) for expert in experts],
        method or TaskArithmetic(),
        out,
        template=template,
        tokenizer=tokenizer,
        **options,
    )
    return load_file(out / "model.safetensors")


def notes_of(folder: Path) -> str:
    return " ".join(json.loads((folder / "unmergeable.json").read_text()).get("notes", []))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def half_of_each(base: Tensor, *experts: Tensor) -> Tensor:
    return base + sum(0.5 * (expert - base) for expert in experts)


def close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, atol=1e-6)
