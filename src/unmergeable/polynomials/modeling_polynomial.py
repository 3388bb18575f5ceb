"""Networks whose feed-forwards are polynomials in their hidden units. This file lies beside the weights it belongs to.

    plain: y = c + sum_n C_n P_n(t)          gated: y = c + sum_n C_n (P_n(t) * up)          t = (z - centre) / scale

z is what the activation function would see, P_n are powers (``taylor``) or orthonormal Hermite polynomials. Each class
``PolynomialX`` is the class ``X`` of transformers with its feed-forwards exchanged, as the ``polynomial`` section of
config.json says. Needs torch and transformers, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

_PREFIX = "Polynomial"


class PolynomialLinear(nn.Module):
    """Activation function and output projection in one; ``settings`` is the ``polynomial`` section, ``sizes`` its part.

    ``weight`` [3, units] holds centre, scale and reach (the largest |t| seen) of every expanded unit. The name is that
    of the projection this module replaces, and the shape is not: another network's class refuses it.
    """

    expanded_units: Tensor
    rest_units: Tensor

    def __init__(self, settings: Mapping[str, Any], sizes: Mapping[str, int], *, is_gated: bool) -> None:
        super().__init__()
        self.basis, self.guard = settings["basis"], settings["guard"]
        self.mask_order, self.mask_radius = settings["mask_order"], settings["mask_radius"]
        units, rest, outputs = sizes["units"], sizes["rest"], sizes["outputs"]
        self.weight = nn.Parameter(torch.empty(3, units), requires_grad=False)
        # Without a factor, order 0 is a constant, and part of the bias.
        orders = range(0 if is_gated else 1, settings["order"] + 1)
        self.coefficients = nn.ParameterDict({str(n): nn.Parameter(torch.empty(outputs, units)) for n in orders})
        self.bias = nn.Parameter(torch.empty(outputs)) if sizes["bias"] else None
        self.rest = nn.Parameter(torch.empty(outputs, rest)) if rest else None
        if rest:
            self.register_buffer("expanded_units", torch.empty(units, dtype=torch.int64))
            self.register_buffer("rest_units", torch.empty(rest, dtype=torch.int64))
            self.activation = ACT2FN[settings["activation"]]
        self.outside: list[int] | None = None

    def forward(self, z: Tensor, factor: Tensor | None = None) -> Tensor:
        """``z`` and ``factor`` [..., hidden units] to [..., outputs]."""
        leading, dtype = z.shape[:-1], self.coefficients["1"].dtype
        z = z.reshape(-1, z.shape[-1])
        factor = None if factor is None else factor.reshape(z.shape)
        output = None
        if self.rest is not None:
            active = self.activation(z[:, self.rest_units])
            if factor is not None:
                active = active * factor[:, self.rest_units]
                factor = factor[:, self.expanded_units]
            output = functional.linear(active.to(dtype), self.rest)
            z = z[:, self.expanded_units]
        for order, term in self._terms(z, factor):
            coefficient = self.coefficients[str(order)]
            output = (
                functional.linear(term.to(dtype), coefficient)
                if output is None
                else torch.addmm(output, term.to(dtype), coefficient.T)
            )
        assert output is not None
        if self.bias is not None:
            output = output + self.bias
        return output.view(*leading, -1)

    def _terms(self, z: Tensor, factor: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """P_n(t) * factor for every order, in float32 at least: roundings add up from power to power."""
        wide = torch.promote_types(z.dtype, torch.float32)
        centre, scale, reach = self.weight.to(wide)
        t = (z.to(wide) - centre) / scale
        far = t.abs() > reach if self.guard == "clamp" else (t * scale).abs() > self.mask_radius
        if self.outside is not None:
            self.outside[0] += int(far.sum())
            self.outside[1] += far.numel()
        if self.guard == "clamp":
            t = torch.minimum(torch.maximum(t, -reach), reach)
        last, term = None, torch.ones_like(t) if factor is None else factor.to(wide)
        for order in range(max(map(int, self.coefficients)) + 1):
            if str(order) in self.coefficients:
                is_masked = self.guard == "mask" and order >= self.mask_order
                yield order, term.masked_fill(far, 0.0) if is_masked else term
            following = t * term
            if self.basis == "hermite":
                if last is not None:
                    following = torch.sub(following, last, alpha=math.sqrt(order))
                following = following / math.sqrt(order + 1)
            last, term = term, following


class PolynomialGated(nn.Module):
    """``down(gate(x), up(x))``, with the names of the module it replaces."""

    def __init__(self, original: nn.Module, names: Mapping[str, str], down: PolynomialLinear) -> None:
        super().__init__()
        self.names = dict(names)
        for role in ("gate", "up"):
            self.add_module(names[role], original.get_submodule(names[role]))
        self.add_module(names["down"], down)

    def forward(self, inputs: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(self.names[role]) for role in ("gate", "up", "down"))
        result: Tensor = down(gate(inputs), up(inputs))
        return result


def exchange_feed_forwards(network: nn.Module, settings: Mapping[str, Any]) -> None:
    """Put polynomials in the place of the feed-forwards that ``settings`` names, relative to the base model."""
    root = getattr(network, str(getattr(network, "base_model_prefix", "")), network)
    for sizes in settings["feed_forwards"]:
        if isinstance(root.get_submodule(sizes["down"]), PolynomialLinear):
            continue  # the base model exchanged its own
        down = PolynomialLinear(settings, sizes, is_gated="gated" in sizes)
        if "gated" in sizes:
            original = root.get_submodule(sizes["module"])
            _exchange(root, sizes["module"], PolynomialGated(original, sizes["gated"], down))
        else:
            _exchange(root, sizes["activation"], nn.Identity())
            _exchange(root, sizes["down"], down)


def _exchange(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


@contextmanager
def guard_counted(network: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Inside, activations outside the guard's limits and all activations are counted, by the name of the module."""
    modules = {name: module for name, module in network.named_modules() if type(module).__name__ == "PolynomialLinear"}
    counts: dict[str, list[int]] = {name: [0, 0] for name in modules}
    for name, module in modules.items():
        module.outside = counts[name]
    try:
        yield counts
    finally:
        for module in modules.values():
            module.outside = None


def __getattr__(name: str) -> type:
    """``PolynomialX`` for every configuration and network class X of transformers."""
    original: Any = getattr(transformers, name.removeprefix(_PREFIX), None)
    if not name.startswith(_PREFIX) or original is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _config_class(name, original) if name.endswith("Config") else _network_class(name, original)
    globals()[name] = made
    return made


def _config_class(name: str, original: Any) -> type:
    # With a model type of its own, transformers never takes the network for the original.
    return type(name, (original,), {"__module__": __name__, "model_type": f"polynomial_{original.model_type}"})


def _network_class(name: str, original: Any) -> type:
    config_class = getattr(_this_module(), _PREFIX + original.config_class.__name__)

    def build(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        # Some classes with a head on top ask AutoModel for the base model of their configuration.
        base_class = getattr(_this_module(), config.auto_map["AutoModel"].rpartition(".")[2])
        transformers.AutoModel.register(config_class, base_class, exist_ok=True)
        original.__init__(self, config, *arguments, **options)
        exchange_feed_forwards(self, config.polynomial)

    return type(name, (original,), {"__module__": __name__, "config_class": config_class, "__init__": build})


def _this_module() -> Any:
    import sys

    return sys.modules[__name__]
