"""Activations in a checkpoint's own basis: the same numbers whatever it is, others for another function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toy_checkpoints import ToyCheckpoint, toy_checkpoint
from unmergeable.checkpoint.memory import MemorySource
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.activations import TOKENS, StreamActivations
from unmergeable.gauge.equivalence import compare
from unmergeable.gauge.gauge import sampled_gauge
from unmergeable.protections import LargestGauge, Weights
from unmergeable.randomness import Stream
from zoo import TOYS

STREAM = Stream.from_seed(4)
SEEN = [name for name in TOYS if toy_checkpoint(name).architecture.residuals]


def in_float64(toy: ToyCheckpoint) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in toy.tensors.items()}


def elsewhere(toy: ToyCheckpoint, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = Weights(MemorySource(tensors))
    gauges = LargestGauge().gauges(toy.architecture, Stream.from_seed(2), weights)
    return transform_all(tensors, toy.architecture.symmetry, gauges)


def is_equal(toy: ToyCheckpoint, first: dict[str, Tensor], second: dict[str, Tensor], *, through: bool) -> bool:
    sides = (MemorySource(tensors) for tensors in (first, second))
    return compare(*sides, toy.architecture, condition=4.0, threads=1, through_streams=through).is_equal


@pytest.mark.parametrize("name", SEEN)
def test_equal_functions_are_equal_through_streams_and_only_there(name: str) -> None:
    toy = toy_checkpoint(name)
    tensors = in_float64(toy)
    moved = elsewhere(toy, tensors)
    assert is_equal(toy, tensors, moved, through=True)
    assert not is_equal(toy, tensors, moved, through=False)
    assert is_equal(toy, tensors, tensors, through=True)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt2", "deepseek_v3", "bert", "dinov2", "clip", "t5", "unet-sd15"]
)
def test_a_change_of_any_single_tensor_shows(name: str) -> None:
    """The control, tensor by tensor: nothing along a stream is compared with something that does not see it."""
    toy = toy_checkpoint(name)
    tensors = in_float64(toy)
    moved = elsewhere(toy, tensors)
    generator = torch.Generator().manual_seed(0)
    # Without positions a bias on the keys adds one number to all scores of a query: the softmax does not see it.
    unseen = {part.key.bias for block in toy.architecture.attentions for part in block.parts if part.rotary is None}
    for key in set(moved) - unseen:
        if "resnets" in key:
            continue  # half the tensors of a UNet, all copied byte for byte
        noise = torch.randn(moved[key].shape, generator=generator, dtype=torch.float64)
        changed = {**moved, key: moved[key] + 1e-3 * moved[key].abs().mean() * noise}
        assert not is_equal(toy, tensors, changed, through=True), key


def test_inputs_pass_the_norm_of_their_reader() -> None:
    toy = toy_checkpoint("gemma")
    tensors = in_float64(toy)
    activations = StreamActivations(MemorySource(tensors), toy.architecture, STREAM)
    query, hidden = "model.layers.1.self_attn.q_proj.weight", 48
    found = activations.inputs(query, hidden)
    assert found.shape == (hidden, TOKENS)
    plain = found / (1 + tensors["model.layers.1.input_layernorm.weight"])[:, None]
    assert torch.allclose(plain.square().mean(0), torch.ones(TOKENS, dtype=torch.float64))
    # In the span of the embeddings, which is what makes it travel with them.
    span = tensors["model.embed_tokens.weight"].T
    assert torch.allclose(span @ torch.linalg.lstsq(span, plain).solution, plain)


def test_latents_are_those_of_the_network() -> None:
    """What DeepSeek's expanding projections read: the RMS norm of the compressed stream, times its gain."""
    toy = toy_checkpoint("deepseek_v3")
    tensors = in_float64(toy)
    activations = StreamActivations(MemorySource(tensors), toy.architecture, STREAM)
    module = "model.layers.0.self_attn"
    compressed = tensors[f"{module}.kv_a_proj_with_mqa.weight"] @ activations.inputs(
        f"{module}.kv_a_proj_with_mqa.weight", 48
    )
    latent = torch.nn.functional.rms_norm(compressed[:20].T, (20,), tensors[f"{module}.kv_a_layernorm.weight"], 1e-6)
    assert torch.allclose(activations.inputs(f"{module}.kv_b_proj.weight", 20), latent.T)


def test_inputs_without_a_stream_are_random_and_the_same_for_all() -> None:
    """Cross-attention of the UNet reads a text that no basis change touches."""
    toy = toy_checkpoint("unet-sd15")
    activations = StreamActivations(MemorySource(in_float64(toy)), toy.architecture, STREAM)
    key = next(name for name in toy.tensors if name.endswith("attn2.to_k.weight"))
    assert torch.equal(activations.inputs(key, 24), torch.from_numpy(STREAM.child("input.24").normal(24, TOKENS)))


def test_norm_gains_may_move_into_their_readers() -> None:
    toy = toy_checkpoint("gpt_neox")
    tensors = in_float64(toy)
    gauge = sampled_gauge(toy.architecture.symmetry.select("norm"), Stream.from_seed(2), 4.0)
    moved = transform_all(tensors, toy.architecture.symmetry, [gauge])
    assert is_equal(toy, tensors, moved, through=True)
    gain = "gpt_neox.final_layer_norm.weight"
    assert not is_equal(toy, tensors, {**moved, gain: tensors[gain]}, through=True)
