"""The closed form is the minimum, and the tensors it is for are those that write to the residual stream."""

from __future__ import annotations

import pytest
import torch

from toy_checkpoints import toy_checkpoint
from unmergeable.attacks import LayerwiseRidge
from unmergeable.attacks.layerwise_ridge import block_tensors, fit_projection, stream_writers
from unmergeable.errors import UsageError

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
