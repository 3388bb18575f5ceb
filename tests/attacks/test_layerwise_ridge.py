"""The closed form is the minimum, and on live networks it finds planted projections in the base's basis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from toy_checkpoints import toy_checkpoint
from unmergeable.architecture import Architecture
from unmergeable.attacks import LayerwiseRidge
from unmergeable.attacks.layerwise_ridge import (
    LayerwiseRidgeResult,
    block_tensors,
    fit_projection,
    layerwise_ridge,
    stream_writers,
)
from unmergeable.errors import BadInput, UsageError
from unmergeable.gauge.act import transform_all
from unmergeable.gauge.gauge import sampled_gauge
from unmergeable.network.disk_weights import swapped
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.load import load_network
from unmergeable.network.tasks import Task
from unmergeable.ops.opened import open_with_architecture
from unmergeable.randomness import Stream
from zoo import TOYS, write_toy

ROWS, INPUTS, OUTPUTS = 40, 6, 3


def problem(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, outputs, and a start."""
    generator = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, INPUTS), (rows, OUTPUTS), (INPUTS, OUTPUTS))
    )


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
def test_is_the_minimum(ridge: float) -> None:
    """Against plain least squares with a row more for every input: sqrt(mu rows) e_i -> sqrt(mu rows) w_0i."""
    inputs, outputs, start = problem()
    gram = inputs.T @ inputs / ROWS
    fitted = fit_projection(gram, inputs.T @ outputs / ROWS, start, ridge)
    pull = (ridge * gram.diagonal().mean() * ROWS).sqrt()
    rows = torch.cat([inputs, pull * torch.eye(INPUTS, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([outputs, pull * start])).solution
    # Normal equations square the condition of the rows.
    bound = 2**-53 * 100 * float(torch.linalg.cond(rows)) ** 2
    assert float((fitted - expected).norm()) <= bound * float(expected.norm())
    assert float((fitted - start).norm()) > 1e-3  # the control


def test_between_the_planted_projection_and_the_start() -> None:
    inputs, _, start = problem()
    planted = 2 * start + 1
    gram, moments = inputs.T @ inputs / ROWS, inputs.T @ inputs @ planted / ROWS
    near = fit_projection(gram, moments, start, 1e-12)
    far = fit_projection(gram, moments, start, 1e12)
    condition = float(torch.linalg.cond(gram))
    assert float((near - planted).norm()) <= 1e-11 * condition * float(planted.norm())
    # D = (G + mu m I)^-1 G (planted - start) <= (planted - start) |G| / (mu m).
    mean = float(gram.diagonal().mean())
    bound = float(torch.linalg.matrix_norm(gram, 2)) / (1e12 * mean) * float((planted - start).norm())
    assert float((far - start).norm()) <= bound + 2**-50 * float(start.norm())


def test_what_no_input_speaks_of_stays() -> None:
    """One row for six inputs: everything at right angles to it is as before."""
    inputs, outputs, start = problem(rows=1)
    fitted = fit_projection(inputs.T @ inputs, inputs.T @ outputs, start, 1e-6)
    step = fitted - start
    across = step - inputs.T @ (inputs @ step) / inputs.square().sum()
    assert float(across.norm()) <= 1e-8 * float(step.norm())
    zero = torch.zeros(INPUTS, INPUTS, dtype=torch.float64)
    assert torch.equal(fit_projection(zero, zero[:, :OUTPUTS], start, 1e-6), start)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "bert"])
def test_shared_tensors_are_those_along_the_stream_alone(name: str) -> None:
    toy = toy_checkpoint(name)
    writers, inside = stream_writers(toy.architecture), block_tensors(toy.architecture)
    assert len(writers) == 4  # attention and feed-forward of two layers
    assert set(writers) | {writer.removesuffix("weight") + "bias" for writer in writers} <= inside
    shared = set(toy.tensors) - inside
    assert any("embed" in name or "wte" in name for name in shared)
    assert any("norm" in name or "ln_" in name for name in {name.lower() for name in shared})
    assert not any("query." in name or "q_proj" in name or "c_attn" in name for name in shared)


def test_refuses_settings_that_mean_nothing() -> None:
    for settings, message in (({"ridge": 0.0}, "ridge=0.0"), ({"examples": 0}, "examples=0")):
        with pytest.raises(UsageError, match=message):
            LayerwiseRidge(**settings).validate()  # type: ignore[arg-type]


State = Mapping[str, Tensor]
CONDITION = 4.0


@dataclass(frozen=True)
class Victim:
    """A base, an expert of it and what the owner releases: the expert with every block in another basis."""

    toy: str
    network: Any
    architecture: Architecture
    base: State
    expert: State
    protected: State

    def inputs(self, seed: int) -> EncodedBatch:
        dtype = next(self.network.parameters()).dtype
        made = TOYS[self.toy].inputs(torch.Generator().manual_seed(seed))
        return EncodedBatch({name: t.to(dtype) if t.is_floating_point() else t for name, t in made.items()})

    def task(self, count: int) -> Task:
        return Task(self.toy, [self.inputs(seed) for seed in range(count)])

    def recover(self, task: Task, **options: Any) -> LayerwiseRidgeResult:
        method = LayerwiseRidge(ridge=options.pop("ridge", 1e-2))
        return layerwise_ridge(self.network, self.protected, self.base, self.architecture, task, method, **options)

    def distance(self, weights: State, other: State) -> float:
        """Between the outputs of two sets of weights on new inputs, relative to those of the second."""
        found, expected = (self._output(state) for state in (weights, other))
        return float((found - expected).norm() / expected.norm())

    def _output(self, weights: State) -> Tensor:
        with swapped(self.network, weights), torch.no_grad():
            output: Tensor = self.network(**self.inputs(999).inputs)[0]
        return output


def victim(toy: str, folder: Path, *, size: float, writers_only: bool, dtype: torch.dtype = torch.float64) -> Victim:
    """A task vector of relative ``size`` in every tensor, or in those along the stream and those that write to it."""
    path = write_toy(TOYS[toy], folder / toy)
    source, architecture = open_with_architecture(path)
    base = {name: source.tensor(name).to(dtype) for name in source.names}
    generator = torch.Generator().manual_seed(5)
    fitted = {end.join(name.rsplit("weight", 1)) for name in stream_writers(architecture) for end in ("weight", "bias")}
    hidden = block_tensors(architecture) - fitted
    expert = {}
    for name, tensor in base.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=dtype) * tensor.norm() / tensor.numel() ** 0.5
        expert[name] = tensor if writers_only and name in hidden else tensor + size * noise
    spaces = architecture.symmetry.select("query_key", "value_output", "heads", "feed_forward", "experts")
    key = sampled_gauge(spaces, Stream.from_seed(4), CONDITION)
    protected = transform_all({name: t.clone() for name, t in expert.items()}, architecture.symmetry, [key])
    return Victim(toy, load_network(path, dtype=dtype), architecture, base, expert, protected)


@pytest.mark.parametrize(
    "toy", ["vit", "gpt2", "llama", "t5", pytest.param("bert-classification", marks=pytest.mark.slow)]
)
def test_recovers_planted_projections_in_the_basis_of_the_base(toy: str, tmp_path: Path) -> None:
    """Where the expert changed nothing else inside its blocks, they are its own, whatever the key."""
    it = victim(toy, tmp_path, size=0.1, writers_only=True)
    result = it.recover(it.task(60), ridge=1e-13)
    names = stream_writers(it.architecture)
    assert [fit.name for fit in result.fits] == sorted(names)
    assert result.skipped == ()
    for fit in result.fits:
        assert fit.after <= 1e-7 < 1e-2 < fit.before
    for name in it.base:
        # What the inputs determine badly is off by more than rounding: the bound leaves them a condition of 1e6.
        assert float((result.weights[name] - it.expert[name]).norm()) <= 1e-6 * float(it.expert[name].norm())
    for name in names:
        assert float((it.protected[name] - it.expert[name]).norm()) > 0.1 * float(it.expert[name].norm())  # control
    assert it.distance(result.weights, it.expert) <= 1e-6
    assert it.distance(it.base, it.expert) > 1e-2


@pytest.mark.parametrize("toy", ["vit", "llama"])
def test_comes_nearer_than_the_base_where_readers_changed_too(toy: str, tmp_path: Path) -> None:
    """And what it finds can be averaged with the base, which the protected weights cannot."""
    it = victim(toy, tmp_path, size=0.1, writers_only=False, dtype=torch.float32)
    result = it.recover(it.task(40))
    untouched = it.recover(it.task(2), ridge=1e12)

    def half(weights: State) -> dict[str, Tensor]:
        return {name: (weights[name] + it.base[name]) / 2 for name in it.base}

    assert all(fit.after < fit.before for fit in result.fits)
    assert it.distance(it.protected, it.expert) < 1e-4
    assert it.distance(result.weights, it.expert) < 0.75 * it.distance(untouched.weights, it.expert)
    assert it.distance(untouched.weights, it.expert) < it.distance(it.base, it.expert)
    assert it.distance(half(result.weights), half(it.expert)) < 0.25 * it.distance(half(it.protected), half(it.expert))


def test_a_large_ridge_gives_the_base(tmp_path: Path) -> None:
    it = victim("vit", tmp_path, size=0.1, writers_only=False)
    inside = block_tensors(it.architecture)
    result = it.recover(it.task(2), ridge=1e14)
    for name in it.base:
        expected = it.base[name] if name in inside else it.protected[name]
        assert torch.allclose(result.weights[name], expected, rtol=0, atol=1e-10)
    small = it.recover(it.task(2))
    name = stream_writers(it.architecture)[0]
    assert not torch.allclose(small.weights[name], it.base[name], rtol=0, atol=1e-3)  # the control


def test_a_small_budget_takes_more_passes_and_gives_the_same(tmp_path: Path) -> None:
    it = victim("llama", tmp_path, size=0.1, writers_only=False)
    passes: list[int] = []

    class Counted(list):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            passes.append(1)
            return super().__iter__()

    task = Task("counted", Counted(it.task(3).batches))
    whole = it.recover(task)
    assert len(passes) == 1
    parts = it.recover(task, memory_budget=1)
    assert len(passes) == 1 + len(stream_writers(it.architecture))
    assert all(torch.equal(whole.weights[name], tensor) for name, tensor in parts.weights.items())


def test_padding_does_not_count(tmp_path: Path) -> None:
    it = victim("llama", tmp_path, size=0.1, writers_only=False)
    ids = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3] * 2)

    def found(ids: Tensor, **more: Tensor) -> State:
        return it.recover(Task("texts", [EncodedBatch({"input_ids": ids, **more})])).weights

    other = torch.where(mask.bool(), ids, 5)
    first, second = found(ids, attention_mask=mask), found(other, attention_mask=mask)
    assert all(torch.equal(first[name], second[name]) for name in first)
    unmasked, changed = found(ids), found(other)
    assert any(not torch.equal(unmasked[name], changed[name]) for name in first)  # the control


def test_experts_of_a_mixture_stay_and_are_named(tmp_path: Path) -> None:
    """They are no linear layers; the attention around them is fitted all the same."""
    it = victim("mixtral", tmp_path, size=0.05, writers_only=False, dtype=torch.float32)
    result = it.recover(it.task(4))
    assert len(result.fits) == 2
    assert all("experts" in name for name in result.skipped)
    assert len(result.skipped) == 8
    assert all(torch.equal(result.weights[name], it.base[name]) for name in result.skipped)


def test_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    it = victim("vit", tmp_path, size=0.1, writers_only=False)
    before = {name: tensor.clone() for name, tensor in it.network.state_dict().items()}
    it.recover(it.task(2))
    with pytest.raises(BadInput, match="vit: no examples"):
        it.recover(Task("vit", []))
    it.base["vit.encoder.layer.0.attention.output.dense.weight"].fill_(torch.inf)
    it.protected["vit.embeddings.cls_token"].fill_(torch.nan)
    with pytest.raises(BadInput, match="are not finite; use float32"):
        it.recover(it.task(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in it.network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in it.network.modules())
