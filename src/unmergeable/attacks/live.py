"""Checkpoints as live networks, for attacks that learn from data, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmergeable.attacks.base import Inputs
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import Mismatch, first_line
from unmergeable.network.disk_weights import find_places
from unmergeable.network.load import load_network
from unmergeable.network.polynomial_network import load_polynomial_network
from unmergeable.polynomials.layout import SECTION

HEAD_SPREAD = 0.02
"""Standard deviation of a head that the base lacks and a student starts with."""


def is_polynomial(source: TensorSource) -> bool:
    """Whether its feed-forwards were replaced by polynomials."""
    return SECTION in source.config


def load(source: TensorSource) -> Any:
    return load_polynomial_network(source.folder) if is_polynomial(source) else load_network(source.folder)


def state_for(network: Any, source: TensorSource) -> dict[str, Tensor]:
    """The source's tensors that the network has, in these shapes; loading passes over the rest."""
    shapes = {name: tuple(place.shape) for name, place in find_places(network).items()}
    return {name: source.tensor(name) for name in source.names if shapes.get(name) == source.spec(name).shape}


def state_without_victim(network: Any, source: TensorSource, inputs: Inputs) -> dict[str, Tensor]:
    """Another model's tensors for the victim's network. An output head that it lacks starts from zero.

    The victim's own head would be a part of the victim.

    Raises:
        Mismatch: it lacks more than a head.
    """
    body = {id(parameter) for parameter in getattr(network, "base_model", network).state_dict(keep_vars=True).values()}
    held, wanted = set(source.names), set(inputs.protected.names)
    state = {}
    for name, place in find_places(network).items():
        if name not in wanted:
            continue  # the victim's file leaves out a second name of the same weight
        if name in held and source.spec(name).shape == tuple(place.shape):
            state[name] = source.tensor(name)
        elif id(place.pieces[0].parameter) in body:
            raise Mismatch(
                f"{source.description} has no tensor {name} of the shape {list(place.shape)}; give a model of the "
                "victim's architecture, or none to compare with the base."
            )
        else:
            state[name] = torch.zeros(place.shape)
    return state


@torch.no_grad()
def with_a_head(network: Any, start: Any, *, seed: int) -> Any:
    """A network of the release's class with the body of ``start`` and a head drawn at random: none of the victim's.

    Raises:
        Mismatch: the bodies are not of one structure.
    """
    body = getattr(network, "base_model", network)
    try:
        missing = body.load_state_dict(start.state_dict(), strict=False).missing_keys
    except RuntimeError as error:
        missing = [first_line(error)]
    if missing:
        raise Mismatch(
            "the release answers by classes, and the base has neither its head nor its structure "
            f"({missing[0]}); give a base with a head of as many classes."
        )
    own = {id(parameter) for parameter in body.parameters()}
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if id(parameter) in own:
            continue
        if parameter.dim() > 1:
            parameter.copy_(HEAD_SPREAD * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return network


def edits_to(weights: Mapping[str, Tensor], template: TensorSource) -> dict[str, Callable[[Tensor], Tensor]]:
    """Edits that put ``weights`` in the place of the template's; it may lack a second name of the same weight."""
    return {name: partial(_replaced, weights[name]) for name in template.names if name in weights}


def _replaced(tensor: Tensor, stored: Tensor) -> Tensor:
    return tensor.to(stored.dtype)
