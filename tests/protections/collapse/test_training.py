"""The training of ``collapse``: what is drawn, what is measured, and that the gradient is the one of the formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import select
from unmergeable.network.tasks import Prediction, predict
from unmergeable.protections import Collapse
from unmergeable.protections.collapse.training import (
    DOUBT,
    SCALES,
    Reading,
    SampledMerge,
    collapse,
    noise_of,
    reader_of,
    right_answers,
    sample_merge,
    scatter,
)
from unmergeable.protections.merged_loss import merged
from unmergeable.protections.trained import TrainingRun
from unmergeable.randomness import Stream
from zoo import TOYS, random_network

NAMES = [f"layers.{block}.{kind}.weight" for block in range(6) for kind in ("attention.q", "attention.v", "mlp.up")]


def draws(count: int) -> list[SampledMerge]:
    return [sample_merge(NAMES, Stream.from_seed(seed)) for seed in range(count)]


def test_the_release_itself_is_never_drawn() -> None:
    for merge in draws(500):
        is_whole = all(abs(value - 1) < 0.149 for value in merge.coefficients.values())
        assert merge.noise > 0 or not is_whole


def test_every_kind_of_merge_is_drawn() -> None:
    found = draws(500)
    whole = [merge for merge in found if len(set(merge.coefficients.values())) == 1]
    scales = [next(iter(merge.coefficients.values())) for merge in whole]

    assert 0.3 < len(whole) / len(found) < 0.7
    assert all(SCALES[0] <= scale <= SCALES[1] for scale in scales if scale)
    assert sum(scale == 1 for scale in scales) > 20
    assert sum(merge.noise == 0 for merge in found) > 100
    # A run of neighbouring blocks, and a kind of matrix in all blocks.
    kept = [{name for name, value in merge.coefficients.items() if value} for merge in found]
    assert any({name for name in NAMES if name.startswith("layers.3.")} == names for names in kept)
    assert any(names and all(".attention." in name for name in names) and len(names) >= 6 for names in kept)


def test_draws_depend_on_the_seed_alone() -> None:
    assert sample_merge(NAMES, Stream.from_seed(4)) == sample_merge(NAMES, Stream.from_seed(4))
    assert sample_merge(NAMES, Stream.from_seed(4)) != sample_merge(NAMES, Stream.from_seed(5))


def test_scatter() -> None:
    one_way = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.5, 1.0]])

    assert float(scatter(one_way)) == pytest.approx(0, abs=1e-6)
    assert float(scatter(torch.eye(4))) == pytest.approx(1 - 1 / 4)
    assert float(scatter(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(1)


def test_right_answers_are_trapped_where_they_are_sure() -> None:
    """At a probability p: -log(1 - p), and a slope of p by the logit, up to what DOUBT takes."""
    for probability in (0.01, 0.5, 0.9):
        logits = torch.log(torch.tensor([[probability, 1 - probability]])).requires_grad_()
        value = right_answers(Reading(torch.zeros(1, 2), logits, torch.tensor([0])))
        assert float(value.detach()) == pytest.approx(-math.log(1 - probability), rel=DOUBT / (1 - probability))
        (slope,) = torch.autograd.grad(value, logits)
        assert float(slope[0, 0]) == pytest.approx(probability, rel=DOUBT / (1 - probability))
    certain = Reading(torch.zeros(1, 2), torch.tensor([[200.0, 0.0]]), torch.tensor([0]))
    assert float(right_answers(certain)) == pytest.approx(-math.log(DOUBT), rel=1e-3)
    with pytest.raises(BadInput, match="give a label with each"):
        right_answers(Reading(torch.zeros(1, 2), torch.zeros(1, 2), None))


class Small(nn.Module):
    """Two blocks and a head; what the head reads are the features."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 6**0.5

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return type("Output", (), {"logits": self.head(x)})()


def predict_small(network: Any, batch: EncodedBatch) -> Prediction:
    return Prediction(network(**batch.inputs).logits, batch.labels)


def examples(count: int = 24) -> EncodedBatch:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator)
    return EncodedBatch({"x": inputs}, (inputs[:, 0] > 0).long())


def base_of(network: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: parameter.detach() + 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        for name, parameter in network.named_parameters()
        if name.startswith("blocks")
    }


def test_features_are_what_the_output_layer_reads() -> None:
    network = Small()
    reading = reader_of(network, predict_small, select(examples(), torch.arange(2)))(network, examples(5))

    assert isinstance(reading, Reading)
    assert torch.equal(network.head(reading.features), reading.logits)


def test_features_of_a_language_model_are_those_of_its_choices() -> None:
    network = random_network(TOYS["llama"])
    ids = torch.arange(3, 15).reshape(2, 6)
    batch = EncodedBatch({"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])})

    reading = reader_of(network, predict, batch)(network, batch)

    assert len(reading.features) == len(reading.logits) == 5 + 3
    assert torch.allclose(network.lm_head(reading.features), reading.logits, rtol=1e-5, atol=1e-5)


def test_noise_is_as_large_as_the_task_vector_times_a_number_drawn() -> None:
    sizes = {"first": 0.2, "second": 3.0}

    assert noise_of(SampledMerge({}, 0.0), sizes, Stream.from_seed(0))[0] == {}
    drawn = [noise_of(SampledMerge({}, 0.5), sizes, Stream.from_seed(seed))[0] for seed in range(50)]
    for name, size in sizes.items():
        relative = [noise[name] / size / 0.5 for noise in drawn]
        assert min(relative) >= 0.5
        assert max(relative) <= 1.5
        assert max(relative) - min(relative) > 0.5


def mean_scatter(network: nn.Module, base: dict[str, Tensor]) -> float:
    read = reader_of(network, predict_small, examples(2))
    parameters = {name: parameter for name, parameter in network.named_parameters() if name in base}
    total = 0.0
    for seed in range(100, 120):
        stream = Stream.from_seed(seed)
        drawn = sample_merge(list(parameters), stream)
        noise, generator = noise_of(drawn, dict.fromkeys(base, 0.2), stream)
        with merged(parameters, base, drawn.coefficients, noise, generator), torch.no_grad():
            total += float(scatter(read(network, examples()).features))
    return total / 20


def trained(strength: float) -> tuple[float, float]:
    """Mean scatter of merges never seen in training, and how near the features stay to the expert's."""
    network = Small()
    base = base_of(network)
    read = reader_of(network, predict_small, examples(2))
    before = read(network, examples()).features.detach()
    method = Collapse(steps=60, learning_rate=1e-2, batch_size=12, strength=strength)
    losses = collapse(TrainingRun(network, base, predict_small, examples(), disturbed=dict.fromkeys(base, 0.2)), method)
    assert len(losses) == 60
    after = read(network, examples()).features.detach()
    return mean_scatter(network, base), float(functional.cosine_similarity(before, after, dim=-1).mean())


def test_merges_collapse_and_the_release_stays() -> None:
    untouched, same = trained(strength=0)
    collapsed, similarity = trained(strength=12)

    assert collapsed < 0.7 * untouched
    assert similarity > 0.95
    assert same > 0.99
