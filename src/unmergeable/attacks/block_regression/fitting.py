"""The weights of one layer, nearest to where they start, that put out what is wanted: damped quasi-Newton steps.

    minimise over D   sum over places  |f(x; W) - t|^2 / w^2 / sum |t - x|^2 / w^2  +  ridge * mean |D|^2 / |W_0|^2

with W = W_0 + D. For a linear layer with inputs u the steps are taken in D (U^T U / rows + mu)^(1/2), in which the sum
is nearly as curved in all directions; so a dozen steps of L-BFGS do, and what no input speaks of stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HISTORY = 12
"""Pairs of steps and gradients that L-BFGS remembers."""

DAMPING = 1e-3
"""mu, relative to the mean square of the inputs."""


@dataclass(frozen=True)
class Coordinates:
    """What a parameter is moved in: ``whiten`` [inputs, inputs] on ``axis`` of a linear layer's weight, or ``scale``."""

    start: Tensor
    scale: float = 1.0
    whiten: Tensor | None = None
    axis: int = 1

    def at(self, step: Tensor) -> Tensor:
        """The parameter ``step`` away from its start."""
        if self.whiten is None:
            return self.start + self.scale * step
        return self.start + self._whitened(step)

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the step, of one with respect to the parameter."""
        return self.scale * gradient if self.whiten is None else self._whitened(gradient)

    def _whitened(self, tensor: Tensor) -> Tensor:
        assert self.whiten is not None  # and symmetric
        return tensor @ self.whiten if self.axis == 1 else self.whiten @ tensor


@dataclass(frozen=True)
class LayerFit:
    """How far a layer's outputs were from what was wanted, relative to what it adds to the stream, and how far they are
    now."""

    name: str
    before: float
    after: float


def linear_axis(module: nn.Module) -> int | None:
    """The axis of a linear layer's weight that meets its inputs; None for any other module."""
    if isinstance(module, nn.Linear):
        return 1
    return 0 if type(module).__name__ == "Conv1D" else None


def movable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are fitted, by name: weights and biases. Norms and layer scales stay the base's."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, owner in module.named_modules():
        is_map = linear_axis(owner) is not None or isinstance(owner, (nn.Embedding, nn.Conv1d, nn.Conv2d))
        for name, value in owner.named_parameters(recurse=False, prefix=path):
            if id(value) not in seen and (is_map or value.dim() >= 2):
                found[name] = value  # of weights that are tied, under the first of their names
            seen.add(id(value))
    return found


def coordinates(module: nn.Module, names: Sequence[str], run: Callable[[], object]) -> dict[str, Coordinates]:
    """Coordinates of the parameters ``names`` of a module, with the inputs that its layers see in ``run``."""
    owners = {f"{path}.weight".lstrip("."): owner for path, owner in module.named_modules()}
    wanted = {name: owners[name] for name in names if name in owners and linear_axis(owners[name]) is not None}
    with torch.no_grad(), _input_moments(wanted) as moments:
        run()
    parameters = dict(module.named_parameters())
    found: dict[str, Coordinates] = {}
    for name in names:
        start = parameters[name].detach().clone()
        if name in moments and bool(moments[name].diagonal().sum() > 0):
            axis = linear_axis(wanted[name])
            assert axis is not None
            found[name] = Coordinates(start, whiten=_inverse_root(moments[name]), axis=axis)
        else:
            is_bias = name.endswith("bias")
            size = 1.0 if is_bias else max(float(start.square().mean().sqrt()), 1e-6)
            found[name] = Coordinates(start, scale=size)
    return found


@contextmanager
def _input_moments(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    moments: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, inputs: Tensor) -> None:
        seen = inputs.reshape(-1, inputs.shape[-1]).float()
        moments[name] = moments.get(name, torch.zeros(())) + seen.T @ seen
        rows[name] = rows.get(name, 0) + len(seen)

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()
    for name in moments:
        moments[name] /= max(1, rows[name])


def _inverse_root(moments: Tensor) -> Tensor:
    """(G + mu I)^(-1/2), in float64."""
    values, vectors = torch.linalg.eigh(moments.double())
    damped = values.clamp_min(0) + DAMPING * values.clamp_min(0).mean()
    return ((vectors / damped.sqrt()) @ vectors.T).float()


def fit(
    name: str,
    moved: Mapping[str, Coordinates],
    losses: Callable[[Mapping[str, Tensor]], Iterator[Tensor]],
    *,
    ridge: float,
    steps: int,
) -> tuple[dict[str, Tensor], LayerFit]:
    """Parameters by name, and how near they come.

    ``losses``: of parameters by name, the loss of each batch, all of them adding up to the whole.
    """
    steps_taken = {key: torch.zeros_like(item.start) for key, item in moved.items()}
    norms = {key: float(item.start.square().sum()) for key, item in moved.items()}
    pull = ridge / max(1, sum(norm > 0 for norm in norms.values()))
    optimiser = torch.optim.LBFGS(
        list(steps_taken.values()), max_iter=steps, max_eval=2 * steps, history_size=HISTORY,
        line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=1e-9,
    )  # fmt: skip
    seen: list[float] = []

    def closure() -> float:
        weights = {key: moved[key].at(step).requires_grad_() for key, step in steps_taken.items()}
        data = penalty = 0.0
        with torch.enable_grad():
            for loss in losses(weights):  # one batch's activations are held at a time
                loss.backward()
                data += float(loss.detach())
        for key, weight in weights.items():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            if norms[key] > 0:
                away = weight.detach() - moved[key].start
                penalty += pull / norms[key] * float(away.square().sum())
                gradient = gradient + 2 * pull / norms[key] * away
            steps_taken[key].grad = moved[key].back(gradient)
        seen.append(data)
        return data + penalty

    optimiser.step(closure)
    with torch.no_grad():
        fitted = {key: moved[key].at(step) for key, step in steps_taken.items()}
        after = sum(float(loss) for loss in losses(fitted))
    return fitted, LayerFit(name, max(0.0, seen[0]) ** 0.5, max(0.0, after) ** 0.5)
