"""Networks that compute in bfloat16: what is rounded, and that a merge inside a step is seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unmergeable.network import precision
from unmergeable.network.precision import FULL, computing_in, slowdown, warn_if_slower
from unmergeable.network.train import Batch, Schedule, train
from unmergeable.protections.merged_loss import gradient_at_merge

CPU = torch.device("cpu")


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 4, bias=False)


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def test_products_are_rounded_and_weights_are_not(layer: nn.Linear, inputs: Tensor) -> None:
    exact, before = layer(inputs), layer.weight.detach().clone()
    with computing_in("bfloat16", CPU):
        rounded = layer(inputs)
    assert rounded.dtype == torch.bfloat16
    # Two factors and the result each round by 2^-9 at most; sums are kept in float32.
    bound = 3 * 2**-8 * (inputs.abs() @ layer.weight.abs().T)
    assert ((rounded - exact).abs() <= bound).all()
    assert not torch.equal(rounded.float(), exact)
    assert torch.equal(layer.weight, before)
    with computing_in(FULL, CPU):
        assert torch.equal(layer(inputs), exact), "control: float32 is what it is without"


def test_weights_that_change_inside_are_rounded_again(layer: nn.Linear, inputs: Tensor) -> None:
    def twice(*, keeps_rounded: bool) -> tuple[Tensor, Tensor]:
        own = layer.weight.data
        with computing_in("bfloat16", CPU, keeps_rounded=keeps_rounded):
            first = layer(inputs)
            layer.weight.data = own * 2
            second = layer(inputs)
        layer.weight.data = own
        return first, second

    first, second = twice(keeps_rounded=False)
    assert torch.equal(second, first * 2)
    first, second = twice(keeps_rounded=True)
    assert torch.equal(second, first), "control: torch keeps what it rounded first"


def test_a_merge_inside_a_step_is_seen_in_bfloat16(layer: nn.Linear, inputs: Tensor) -> None:
    """The loss of a release and that of its merge, in one step: the second is of other weights than the first."""
    base = {"weight": torch.zeros(4, 16)}
    seen: list[tuple[float, float]] = []

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        (rows,) = batch
        own = network(rows).float().square().mean()
        parameters = dict(network.named_parameters())
        value, _ = gradient_at_merge(
            lambda: network(rows).float().square().mean(), parameters, base, dict.fromkeys(parameters, 0.5)
        )
        seen.append((own.item(), value))
        return own

    train(layer, iter([(inputs,)] * 2), loss, Schedule(2, 1e-3), precision="bfloat16")
    for own, merged in seen:
        assert merged == pytest.approx(own / 4, rel=0.02), "half the weights, a quarter of the squares"


@pytest.mark.parametrize(("times", "is_said"), [(6.0, True), (0.4, False), (1.1, False)])
def test_a_processor_that_is_slower_so_is_said(
    times: float, is_said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "slowdown", lambda: times)
    warn_if_slower("bfloat16", CPU)
    said = [record.getMessage() for record in caplog.records]
    assert bool(said) == is_said
    assert not is_said or "takes 6 times as long for a product of matrices in bfloat16 as in float32" in said[0]


def test_nothing_is_measured_where_nothing_is_rounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "slowdown", lambda: pytest.fail("measured"))
    warn_if_slower(FULL, CPU)
    warn_if_slower("bfloat16", torch.device("cuda"))
    assert not caplog.records


def test_what_a_product_costs_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which products of rounded matrices take three times as long."""
    slowdown.cache_clear()
    seconds = iter([*[0.0, 3.0] * 3, *[0.0, 1.0] * 3])
    monkeypatch.setattr(precision, "process_time", lambda: next(seconds))
    assert slowdown() == pytest.approx(3)
    slowdown.cache_clear()
