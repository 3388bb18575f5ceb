from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from network.small_classifier import Classifier, make_task
from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.protections.sensitivity_shield.input_norms import input_norms


class Reader(nn.Module):
    """Takes ``features`` [examples, tokens, 3] and a mask it does not look at."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        self.unused = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, features: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.layer(features))


def test_norms_are_those_of_all_inputs_together() -> None:
    network, task = Classifier(), make_task(11, 4)
    features = torch.cat([batch.inputs["features"] for batch in task.batches])
    hidden = torch.tanh(network.inner(features)).detach()

    class Taking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = network.inner, network.outer

        def forward(self, features: Tensor) -> Tensor:
            return network(features)

    found = input_norms(Taking(), task.batches)

    # Sums of 11 squares, in another order.
    bound = 11 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(found["inner.weight"].norms, features.norm(dim=0), rtol=bound, atol=0)
    torch.testing.assert_close(found["outer.weight"].norms, hidden.norm(dim=0), rtol=bound, atol=0)
    assert found["inner.weight"].axis == 1
    assert not any(module._forward_pre_hooks for module in network.modules()), "hooks are gone"


def test_padding_does_not_count_and_a_layer_without_inputs_has_norms_of_zero() -> None:
    features = torch.tensor([[[3.0, 0.0, 1.0], [4.0, 0.0, 1.0], [100.0, 100.0, 100.0]]], dtype=torch.float64)

    def norms(mask: list[int]) -> dict[str, list[float]]:
        batch = EncodedBatch({"features": features, "attention_mask": torch.tensor([mask])})
        return {name: its.norms.tolist() for name, its in input_norms(Reader(), [batch]).items()}

    masked = norms([1, 1, 0])
    assert masked["layer.weight"] == pytest.approx([5.0, 0.0, 2.0**0.5], rel=2**-52)
    assert masked["unused.weight"] == [0.0, 0.0, 0.0]
    assert norms([1, 1, 1])["layer.weight"][1] == 100.0, "control: the last place is seen when the mask shows it"


def test_refuses_what_says_nothing() -> None:
    with pytest.raises(BadInput, match="no examples"):
        input_norms(Reader(), [])
    broken = EncodedBatch(
        {"features": torch.full((1, 2, 3), torch.nan, dtype=torch.float64), "attention_mask": torch.ones(1, 2)}
    )
    with pytest.raises(BadInput, match=r"layer\.weight: its inputs on the data are not finite"):
        input_norms(Reader(), [broken])
