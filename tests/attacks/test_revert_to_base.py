"""revert_to_base gives a checkpoint of the base's structure, with everything that still fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attacks.planted import Build
from polynomials.written import original
from unmergeable.attacks import Inputs, RevertToBase
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import Mismatch, UsageError
from unmergeable.polynomials.rewriting import Polynomials

FEED_FORWARD = ".mlp."


def test_reverts_what_lost_its_structure(network: Build) -> None:
    toy = network("llama")
    expert = toy.expert(0.1)
    # Feed-forwards as a polynomial's coefficients under names of their own; one tensor of another shape.
    changed = {name: tensor for name, tensor in expert.tensors.items() if FEED_FORWARD not in name}
    changed |= {f"model.layers.{layer}.mlp.coefficients": torch.zeros(3, 48, 80) for layer in range(2)}
    changed["lm_head.weight"] = torch.zeros(5, 48)
    recovered = RevertToBase().recover(Inputs(MemorySource(changed), toy.base, toy.architecture))

    assert recovered.template is toy.base
    for name, base in toy.base.tensors.items():
        found = recovered.edits[name](base.clone()) if name in recovered.edits else base
        is_reverted = FEED_FORWARD in name or name == "lm_head.weight"
        assert torch.equal(found, base if is_reverted else expert.tensors[name])
    assert recovered.findings == {"tensors_kept": len(toy.base.tensors) - 7, "tensors_reverted": 7}


@pytest.mark.parametrize("family", ["vit", "dinov2", "gpt2"])
def test_attention_of_a_network_of_polynomials_is_kept_whatever_its_names(family: str, tmp_path: Path) -> None:
    """Files of ViT and DINOv2 use names of their own; those of polynomials the modules'."""
    model = original(family, tmp_path / family)
    out = model.write(tmp_path / "out", Polynomials("taylor", 4))
    base = MemorySource({name: model.source.tensor(name) + 1 for name in model.source.names})
    recovered = RevertToBase().recover(Inputs(Checkpoint.open(out), base, model.architecture))

    attention = model.architecture.symmetry.tensors_of(model.architecture.symmetry.select("query_key", "value_output"))
    assert set(attention) <= set(recovered.edits)
    for name in attention:
        assert torch.equal(recovered.edits[name](base.tensor(name)), model.source.tensor(name))
    projections = {block.down.weight for block in model.architecture.feed_forwards}
    assert not projections & set(recovered.edits)


def test_reverts_what_it_is_told(network: Build) -> None:
    toy = network("llama")
    expert = toy.expert(0.1)
    recovered = RevertToBase(tensors=r"\.1\.mlp\.").recover(Inputs(expert, toy.base, toy.architecture))

    assert set(toy.base.names) - set(recovered.edits) == {
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }


def test_refuses_what_makes_no_sense(network: Build) -> None:
    toy = network("llama")

    with pytest.raises(UsageError, match="say which to revert with tensors=PATTERN"):
        RevertToBase().recover(Inputs(toy.expert(0.1), toy.base, toy.architecture))
    with pytest.raises(Mismatch, match="holds no tensor of base to keep"):
        RevertToBase(tensors=".").recover(Inputs(toy.expert(0.1), toy.base, toy.architecture))
    with pytest.raises(UsageError, match="no regular expression"):
        RevertToBase(tensors="(").validate()
