"""Names saved from inside a wrapper: read, and written, without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.rewrite import output_like, rewrite
from unmergeable.checkpoint.wrappers import unwrapped_names

WriteFolder = Callable[..., Path]
BARE = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight")


@pytest.mark.parametrize(
    "wrap",
    [
        "_orig_mod.{}",
        "module.{}",
        "pretrained_model.{}",
        "base_model.model.{}",
        "_orig_mod.module.{}",
        "module._orig_mod.{}",
        "_forward_module.{}",
    ],
)
def test_prefixes(wrap: str) -> None:
    assert unwrapped_names([wrap.format(name) for name in BARE]) == {wrap.format(name): name for name in BARE}


def test_parts_between() -> None:
    name = "model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.up_proj.weight"
    assert unwrapped_names([name]) == {name: BARE[1]}


@pytest.mark.parametrize(
    "names",
    [
        BARE,
        ("module.a.weight", "b.weight"),  # only one carries it: a part of the network that is called so
        ("_orig_mod.a.weight", "a.weight"),  # two would become one
        ("_orig_mod",),  # nothing would be left
        (),
    ],
)
def test_names_that_stay(names: tuple[str, ...]) -> None:
    assert unwrapped_names(names) == {}


def test_a_value_head_stands_beside_what_is_wrapped() -> None:
    names = ["pretrained_model.lm_head.weight", "v_head.summary.weight"]
    assert list(unwrapped_names(names).values()) == ["lm_head.weight", "v_head.summary.weight"]


@pytest.mark.parametrize("pickled", [False, True])
def test_a_wrapped_checkpoint_is_that_of_its_network(pickled: bool, tmp_path: Path, single: WriteFolder) -> None:
    tensors = {name: torch.full((2, 3), float(number)) for number, name in enumerate(BARE)}
    folder = single(tmp_path / "in", {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    source = open_checkpoint(folder, allow_pickle=pickled)
    assert set(source.names) == set(BARE)
    assert all(torch.equal(source.tensor(name), tensors[name]) for name in BARE)
    assert "_orig_mod.lm_head.weight" in source.index.notes[0]

    rewrite(source, tmp_path / "out", output_like(source, {}), manifest={}, resume_token="")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as written:
        assert set(written.keys()) == set(BARE)
        assert all(torch.equal(written.get_tensor(name), tensors[name]) for name in BARE)
