"""Low-rank updates change linear layers alone, by a matrix of their rank, and leave no trace but that."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from network.small_classifier import Classifier
from unmergeable.errors import BadInput, UsageError
from unmergeable.network.load import load_network
from unmergeable.network.low_rank import low_rank_updates
from unmergeable.network.train import Schedule, train
from zoo import TOYS, write_toy

RANK = 2


def learn(network: nn.Module, toy: str, *, steps: int = 3, seed: int = 0) -> None:
    """Some steps towards zero outputs, adapters only."""
    inputs = TOYS[toy].inputs(torch.Generator().manual_seed(0))
    batches = [tuple(inputs.values())] * steps
    with low_rank_updates(network, rank=RANK, alpha=RANK, seed=seed) as is_adapter:
        train(
            network,
            batches,
            lambda net, batch: net(**dict(zip(inputs, batch, strict=True)))[0].square().mean(),
            Schedule(steps, learning_rate=0.01),
            is_trained=is_adapter,
        )


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("toy", ["vit", "gpt2", "llama"])
def test_all_linear_layers_and_nothing_else_change_by_the_rank(toy: str, tmp_path: Path) -> None:
    network = load_network(write_toy(TOYS[toy], tmp_path / "toy"))
    before, parameters = state(network), dict(network.named_parameters())
    linear = {
        f"{name}.weight" for name, module in network.named_modules() if type(module).__name__ in ("Linear", "Conv1D")
    }
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    learn(network, toy)
    after = network.state_dict()

    assert list(after) == list(before)
    assert all(network.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert {name: p.requires_grad for name, p in network.named_parameters()} == flags
    assert not hasattr(network, "peft_config")
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == linear - ({"lm_head.weight"} if toy == "gpt2" else set())  # which is the embedding
    for name in changed:
        update = after[name].double() - before[name].double()
        values = torch.linalg.svdvals(update)
        # Adding to the weight rounds every entry once: the rest of the spectrum is that noise.
        noise = 2**-24 * float(after[name].norm()) * 2
        assert bool((values[RANK:] <= noise).all())
        assert bool(values[0] > 10 * noise)  # the control


def test_a_shared_embedding_is_left_alone(tmp_path: Path) -> None:
    """The head of GPT-2 is its embedding."""
    network = load_network(write_toy(TOYS["gpt2"], tmp_path / "toy"))
    assert network.lm_head.weight is network.transformer.wte.weight
    before = network.lm_head.weight.detach().clone()
    learn(network, "gpt2")
    assert torch.equal(network.lm_head.weight, before)
    assert network.lm_head.weight is network.transformer.wte.weight


@pytest.mark.parametrize("toy", ["vit", "gpt2"])
def test_merging_keeps_the_function(toy: str, tmp_path: Path) -> None:
    network = load_network(write_toy(TOYS[toy], tmp_path / "toy"), dtype=torch.float64)
    inputs = TOYS[toy].inputs(torch.Generator().manual_seed(0))
    inputs = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        original = network(**inputs)[0]
        with low_rank_updates(network, rank=RANK, alpha=4.0, seed=0) as is_adapter:
            untouched = network(**inputs)[0]
            for name, parameter in network.named_parameters():
                if is_adapter(name):
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            adapted = network(**inputs)[0]
        merged = network(**inputs)[0]

    assert torch.equal(untouched, original)  # B starts at zero
    size = float(adapted.norm())
    # Double rounding times a generous condition of the network; the update is many orders above it.
    assert float((merged - adapted).norm()) <= 2**-53 * 1e5 * size
    assert float((adapted - original).norm()) >= 1e-3 * size


def test_names_are_not_endings() -> None:
    """``inner`` at the top is a linear layer; ``block.inner`` is an embedding of that ending, and stays."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.block = nn.ModuleDict({"inner": nn.Embedding(4, 3)})

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(self.block["inner"](ids))

    network = Nested()
    with low_rank_updates(network, rank=1, alpha=1.0, seed=0) as is_adapter:
        names = [name for name, _ in network.named_parameters() if is_adapter(name)]
    assert {name.partition(".")[0] for name in names} == {"inner"}
    assert len(names) == 2


def test_the_seed_alone_decides_the_start() -> None:
    network = Classifier()

    def start(seed: int) -> Tensor:
        with low_rank_updates(network, rank=1, alpha=1.0, seed=seed) as is_adapter:
            return torch.cat([p.detach().flatten() for n, p in network.named_parameters() if is_adapter(n)])

    state = torch.get_rng_state()
    first = start(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(start(0), first)
    assert not torch.equal(start(1), first)


def test_after_an_error_the_network_is_as_before() -> None:
    network = Classifier()
    before, modules = state(network), list(network.modules())

    def break_off() -> None:
        with torch.no_grad(), low_rank_updates(network, rank=1, alpha=1.0, seed=0) as is_adapter:
            for name, parameter in network.named_parameters():
                if is_adapter(name):
                    parameter.fill_(1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert list(network.modules()) == modules
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(BadInput, match="Embedding has no linear layer"),
        low_rank_updates(nn.Embedding(2, 2), rank=1, alpha=1.0, seed=0),
    ):
        pass
    with pytest.raises(UsageError, match="rank=0"), low_rank_updates(Classifier(), rank=0, alpha=1.0, seed=0):
        pass
    monkeypatch.setitem(sys.modules, "peft", None)
    with (
        pytest.raises(UsageError, match=r"pip install 'unmergeable\[lora\]'"),
        low_rank_updates(Classifier(), rank=1, alpha=1.0, seed=0),
    ):
        pass
