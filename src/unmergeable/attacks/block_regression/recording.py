"""The stream of a live network between its layers, whatever these are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import answer, refusing

WIDE = 4096
"""Outputs that are wider (a language model's choice of a token) are not fitted: the embedding is, which they share."""


@dataclass(frozen=True)
class LayerStack:
    """A run of layers, each of which gives its successor the stream: ``path`` of the list in the network."""

    path: str
    layers: tuple[nn.Module, ...]


def layer_stacks(network: nn.Module) -> tuple[LayerStack, ...]:
    """The runs of layers of a network, outermost lists only, in the order of its modules."""
    found: list[LayerStack] = []
    for path, module in network.named_modules():
        is_inside = any(path.startswith(f"{stack.path}.") for stack in found)
        if isinstance(module, nn.ModuleList) and not is_inside and len({type(layer) for layer in module}) == 1:
            found.append(LayerStack(path, tuple(module)))
    return tuple(found)


@dataclass(frozen=True)
class Recording:
    """What a network did on some batches.

    ``streams``: for each stack, before its first layer and behind each, the stream batch by batch: float32
    [rows, width], rows being the places that a mask shows. ``outputs``: what the network put out, first of all; none
    where that is wider than :data:`WIDE`.
    """

    streams: tuple[tuple[tuple[Tensor, ...], ...], ...]
    outputs: tuple[Tensor, ...]


@torch.no_grad()
def record(network: nn.Module, batches: Sequence[EncodedBatch]) -> Recording:
    """Run a network on all batches.

    Raises:
        BadInput: it does not take them, has no layers behind one another, or its activations are not finite.
    """
    stacks = layer_stacks(network)
    if not stacks:
        raise BadInput(
            f"{type(network).__name__} has no run of layers whose stream could be followed; recover it another way."
        )
    seen: list[list[list[Tensor]]] = [[[] for _ in range(len(stack.layers) + 1)] for stack in stacks]
    outputs: list[Tensor] = []
    for batch in batches:
        with ExitStack() as hooks:
            for stack, places in zip(stacks, seen, strict=True):
                first = stack.layers[0].register_forward_pre_hook(_keeping(batch, places[0]), with_kwargs=True)
                hooks.callback(first.remove)
                for layer, place in zip(stack.layers, places[1:], strict=True):
                    hook = layer.register_forward_hook(
                        lambda _, __, out, to=place, of=batch: to.append(of.visible(stream_in(out)).float())
                    )
                    hooks.callback(hook.remove)
            output = first_of(answer(network, batch))
            outputs += [output.float()] if output.shape[-1] <= WIDE else []
    for places in seen:
        if any(len(place) != len(batches) for place in places):
            raise BadInput(f"{type(network).__name__} does not go through its layers once; recover it another way.")
        if not all(bool(tensor.isfinite().all()) for place in places for tensor in place):
            raise BadInput(f"activations of {type(network).__name__} are not finite on these inputs; give others.")
    return Recording(tuple(tuple(tuple(place) for place in places) for places in seen), tuple(outputs))


def _keeping(batch: EncodedBatch, place: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        place.append(batch.visible(stream_of_call(args, kwargs)).float())

    return keep


def stream_in(output: Any) -> Tensor:
    """The stream in what a layer returns."""
    tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return tensor


def stream_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The stream in what a layer is called with."""
    tensor: Tensor = args[0] if args else kwargs["hidden_states"]
    return tensor


def first_of(output: Any) -> Tensor:
    """The first tensor that a network puts out: logits, or the last stream."""
    if isinstance(output, Tensor):
        return output
    values = output.to_tuple() if hasattr(output, "to_tuple") else tuple(output)
    tensor: Tensor = next(value for value in values if isinstance(value, Tensor))
    return tensor


class _Reached(Exception):
    """The layer was reached; what comes behind it is not needed."""


@dataclass(frozen=True)
class Call:
    """What a layer is called with for one batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def call_of(network: nn.Module, layer: nn.Module, batch: EncodedBatch, run: Callable[[], Any] | None = None) -> Call:
    """What ``layer`` is called with when ``network`` sees the batch; nothing behind it is computed."""
    calls: list[Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        calls.append(Call(args, kwargs))
        raise _Reached

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with refusing(network, "does not take these inputs", "give data made for this network"):
            (run or (lambda: network(**batch.inputs)))()
    except _Reached:
        pass
    finally:
        hook.remove()
    return calls[0]


class _Given(nn.Module):
    """Stands for a whole stack: puts out what it is told to."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.output: Any = None
        for name in ("attention_type", "layer_type"):  # which networks ask their layers for
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


@contextmanager
def given(network: nn.Module, stacks: Sequence[LayerStack]) -> Iterator[tuple[_Given, ...]]:
    """Inside, each stack is one layer that computes nothing and puts out what its ``output`` is set to."""
    stand_ins = tuple(_Given(stack.layers[-1]) for stack in stacks)
    places = [(network.get_submodule(stack.path.rpartition(".")[0]), stack.path.rpartition(".")[2]) for stack in stacks]
    kept = [getattr(parent, name) for parent, name in places]
    try:
        for (parent, name), stand_in in zip(places, stand_ins, strict=True):
            setattr(parent, name, nn.ModuleList([stand_in]))
        yield stand_ins
    finally:
        for (parent, name), layers in zip(places, kept, strict=True):
            setattr(parent, name, layers)
