"""Which parts of ``gauge`` leave hidden states as they are, which do not, and that the owner is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unmergeable
from toy_checkpoints import toy_checkpoint
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.protections import LargestGauge
from unmergeable.protections.exact import HIDDEN_STATES, ExactSequence
from unmergeable.settings import configure
from zoo import TOYS

KEPT = {"residual": False, "norms": False}
CAUSAL = ("llama", "qwen2", "qwen3", "gemma2", "gpt2", "phi", "opt")


def run(network: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad():
        output = network(**inputs, output_hidden_states=True)
    return output.logits, list(output.hidden_states)


def largest_difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


@pytest.mark.parametrize("quantisation", ["kept", "free"])
@pytest.mark.parametrize("name", CAUSAL)
def test_hidden_states_stay_without_the_stream_and_move_with_it(name: str, quantisation: str) -> None:
    toy = TOYS[name]
    network = toy.build().eval()
    inputs = toy.inputs(torch.Generator().manual_seed(0))
    logits, states = run(network, inputs)
    assert len(states) > 2

    for settings, is_kept in (KEPT, True), ({}, False):
        released = toy.build().eval()
        released.load_state_dict(network.state_dict())
        given = {**settings, "quantisation": quantisation}
        state, _ = unmergeable.protect_state_dict(released, method="gauge", settings=given, seed=1)
        assert not released.load_state_dict(state, strict=False).unexpected_keys
        assert any(not torch.equal(tensor, network.state_dict()[key]) for key, tensor in state.items())
        found, moved = run(released, inputs)
        # Rounding of float32, a condition of 4, some hundred sums in a row.
        bound = 4 * 256 * torch.finfo(torch.float32).eps
        assert largest_difference(found, logits) < bound
        differences = [largest_difference(new, old) for new, old in zip(moved, states, strict=True)]
        assert (max(differences) < bound) == is_kept, differences
        assert is_kept or min(differences) > 0.1


@pytest.mark.parametrize(("method", "settings", "is_told"), [
    ("gauge", {}, True), ("gauge", KEPT, False), ("mergelock", {}, False), ("params", {}, False),
])  # fmt: skip
def test_the_owner_is_told_where_hidden_states_move(method: str, settings: dict[str, object], is_told: bool) -> None:
    from unmergeable.protections import PROTECTIONS

    toy = toy_checkpoint("llama")
    sequence = ExactSequence((configure(PROTECTIONS[method], settings),))
    facts = sequence._facts(MemorySource(toy.tensors, toy.config), toy.architecture)
    assert (HIDDEN_STATES in facts.notes) == is_told


def test_the_settings_that_the_note_names_are_those_that_keep_them() -> None:
    named = dict(word.split("=") for word in HIDDEN_STATES.split("`")[1].replace("--set ", "").split())
    assert {name: value == "true" for name, value in named.items()} == KEPT
    sequence = ExactSequence((configure(LargestGauge, named),))
    assert not any(sequence.moves_streams(toy_checkpoint(name).architecture) for name in CAUSAL)
