from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.ops.opened import architecture_of
from unmergeable.protections.activation_ranges import activation_ranges
from zoo import TOYS, load_toy, write_toy


def batches(seed: int, *, masked: int = 0) -> list[EncodedBatch]:
    """Three batches of two texts; the last ``masked`` tokens of each are padding."""
    found = []
    for number in range(3):
        inputs = TOYS["gpt2"].inputs(torch.Generator().manual_seed(seed + number))
        mask = torch.ones_like(inputs["input_ids"])
        mask[:, mask.shape[1] - masked :] = 0
        found.append(EncodedBatch({**inputs, "attention_mask": mask}))
    return found


@torch.no_grad()
def test_ranges_are_those_of_all_inputs_together(tmp_path: Path) -> None:
    folder = write_toy(TOYS["gpt2"], tmp_path / "gpt2")
    network, architecture = load_toy(folder, TOYS["gpt2"]), architecture_of(Checkpoint.open(folder))
    seen: list[Tensor] = []
    masks = batches(0, masked=3)
    hook = network.transformer.h[1].mlp.c_fc.register_forward_hook(
        lambda module, arguments, output: seen.append(output)
    )
    for batch in masks:
        network(**batch.inputs)
    hook.remove()
    kept = torch.cat([output[batch.inputs["attention_mask"].bool()] for output, batch in zip(seen, masks, strict=True)])
    kept = kept.double()

    found = activation_ranges(network, architecture, masks)
    ranges = found["transformer.h.1.mlp"]
    assert set(found) == {"transformer.h.0.mlp", "transformer.h.1.mlp"}
    assert ranges.count == len(kept) == 3 * 2 * 8
    assert torch.equal(ranges.low, kept.amin(0))
    assert torch.equal(ranges.high, kept.amax(0))
    assert torch.allclose(ranges.mean, kept.mean(0), rtol=0, atol=1e-14)
    assert torch.allclose(ranges.variance, kept.var(0, unbiased=False), rtol=1e-13, atol=0)
    # Control: with the padding the ranges are wider somewhere.
    with_padding = torch.cat(seen).flatten(0, 1).double()
    assert not torch.equal(with_padding.amax(0), ranges.high)


def test_same_in_one_batch_or_many(tmp_path: Path) -> None:
    folder = write_toy(TOYS["gpt2"], tmp_path / "gpt2")
    network, architecture = load_toy(folder, TOYS["gpt2"]), architecture_of(Checkpoint.open(folder))
    many = batches(0)
    one = EncodedBatch({name: torch.cat([batch.inputs[name] for batch in many]) for name in many[0].inputs})

    for name, ranges in activation_ranges(network, architecture, many).items():
        together = activation_ranges(network, architecture, [one])[name]
        assert torch.allclose(ranges.low, together.low, atol=1e-6)
        assert torch.allclose(ranges.variance, together.variance, rtol=1e-5)


def test_refuses_no_data(tmp_path: Path) -> None:
    folder = write_toy(TOYS["gpt2"], tmp_path / "gpt2")
    network, architecture = load_toy(folder, TOYS["gpt2"]), architecture_of(Checkpoint.open(folder))

    with pytest.raises(BadInput, match="no examples to calibrate on"):
        activation_ranges(network, architecture, [])
    broken = load_toy(folder, TOYS["gpt2"])
    broken.transformer.wte.weight.data.fill_(float("nan"))
    with pytest.raises(BadInput, match=r"transformer\.h\.0\.mlp: no finite activations"):
        activation_ranges(broken, architecture, batches(0))


def test_a_decoder_beside_an_encoder_reads_inputs_of_its_own(tmp_path: Path) -> None:
    """Texts give the encoder's alone, and that is said; ready inputs give both."""
    folder = write_toy(TOYS["flan-t5"], tmp_path / "t5")
    network, architecture = load_toy(folder, TOYS["flan-t5"]), architecture_of(Checkpoint.open(folder))
    inputs = TOYS["flan-t5"].inputs(torch.Generator().manual_seed(0))
    found = activation_ranges(network, architecture, [EncodedBatch(inputs)])
    counts = {name.partition(".")[0]: ranges.count for name, ranges in found.items()}
    assert counts == {"encoder": inputs["input_ids"].numel(), "decoder": inputs["decoder_input_ids"].numel()}
    without = EncodedBatch({"input_ids": inputs["input_ids"]})
    with pytest.raises(BadInput, match=r"T5ForConditionalGeneration does not take the inputs input_ids \[2, 11\]"):
        activation_ranges(network, architecture, [without])
