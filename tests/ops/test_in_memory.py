"""Exact protections in memory: the bits of the files, live networks, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import unmergeable
from toy_checkpoints import ToyCheckpoint, toy_checkpoint
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import KeyFileError, NotEquivalent, UsageError
from unmergeable.gauge.key import Key, read_key
from unmergeable.ops.in_memory import protect_state_dict, restore_state_dict
from zoo import TOYS, load_toy, write_toy


def changed(first: dict[str, torch.Tensor], toy: ToyCheckpoint) -> set[str]:
    assert list(first) == list(toy.tensors)
    return {name for name, tensor in toy.tensors.items() if not torch.equal(first[name], tensor)}


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "mergelock"), ("gpt2", "gauge"), ("vit", "params"), ("mixtral", "params,gauge"), ("llama", None)],
)
def test_the_same_secret_gives_the_bits_of_the_files(name: str, method: str | None, tmp_path: Path) -> None:
    toy = toy_checkpoint(name)
    expert = write_toy(TOYS[name], tmp_path / "expert")
    base = write_toy(TOYS[name], tmp_path / "base", seed=1)
    unmergeable.protect(expert, base=base, method=method, out=tmp_path / "out", key=tmp_path / "key", seed=7)
    written, origin = Checkpoint.open(tmp_path / "out"), Checkpoint.open(base)
    base_state = {key: origin.tensor(key) for key in origin.names}

    state, key = protect_state_dict(toy.tensors, toy.config, method=method, base=base_state, seed=7)
    assert all(torch.equal(state[tensor], written.tensor(tensor)) for tensor in toy.tensors)
    assert key.entropy == read_key(tmp_path / "key").entropy
    assert changed(state, toy)

    unmergeable.restore(tmp_path / "out", key=tmp_path / "key", out=tmp_path / "restored")
    restored = Checkpoint.open(tmp_path / "restored")
    again = restore_state_dict(state, toy.config, key=key)
    assert all(torch.equal(again[tensor], restored.tensor(tensor)) for tensor in toy.tensors)
    # Control: without a seed the operating system draws the key, and other bits come out.
    other, _ = protect_state_dict(toy.tensors, toy.config, method=method, base=base_state)
    assert any(not torch.equal(other[tensor], state[tensor]) for tensor in state)


def test_what_is_not_changed_is_shared_and_what_was_given_stays() -> None:
    toy = toy_checkpoint("llama")
    before = {name: tensor.clone() for name, tensor in toy.tensors.items()}
    state, _ = protect_state_dict(toy.tensors, toy.config, method="mergelock")
    moved = changed(state, toy)
    assert all((state[name] is toy.tensors[name]) == (name not in moved) for name in state)
    assert all(torch.equal(before[name], tensor) for name, tensor in toy.tensors.items())


@pytest.mark.parametrize("name", ["llama-bias-tied-mqa", "t5", "mixtral"])
def test_a_live_network_is_taken_as_its_files_would_be(name: str, tmp_path: Path) -> None:
    """Tied weights count once, and fused experts are split, as in the files."""
    toy = toy_checkpoint(name)
    network = load_toy(write_toy(TOYS[name], tmp_path / "expert"), TOYS[name], torch.float32)
    from_network, key = protect_state_dict(network, method="mergelock", seed=7)
    from_files, _ = protect_state_dict(toy.tensors, toy.config, method="mergelock", seed=7)
    assert from_network.keys() == from_files.keys()
    assert all(torch.equal(from_network[tensor], from_files[tensor]) for tensor in from_files)
    restored = restore_state_dict(from_network, network.config, key=key)
    assert all((restored[k] - tensor).norm() <= 1e-5 * tensor.norm() for k, tensor in toy.tensors.items())


def test_a_head_stored_apart_is_tied_again() -> None:
    toy = toy_checkpoint("gemma")
    state, key = protect_state_dict(toy.tensors, toy.config, method="gauge", settings={"untie": True})
    assert state.keys() == toy.tensors.keys() | {"lm_head.weight"}
    restored = restore_state_dict(state, {**toy.config, "tie_word_embeddings": False}, key=key)
    assert restored.keys() == toy.tensors.keys()


def test_refuses_what_works_on_files_or_does_not_fit() -> None:
    toy = toy_checkpoint("llama")
    with pytest.raises(UsageError, match="taylor_mlp has no key and works on files"):
        protect_state_dict(toy.tensors, toy.config, method="mergelock,taylor_mlp")
    with pytest.raises(UsageError, match="params looks at the base"):
        protect_state_dict(toy.tensors, toy.config, method="params")
    with pytest.raises(UsageError, match="give its config"):
        protect_state_dict(toy.tensors)
    with pytest.raises(NotEquivalent, match="as published is not exact"):
        protect_state_dict(toy.tensors, toy.config, method="mergelock", settings={"as_published": True}, seed=1)
    other = Key(bytes(32), {"architecture": "gpt2", "steps": []})
    with pytest.raises(KeyFileError, match="made for a gpt2 network"):
        restore_state_dict(toy.tensors, toy.config, key=other)
