"""A live network's weights under the names they have on disk, and other weights put in their place without a copy.

transformers renames tensors when it loads them, and stores some fused (the experts of a mixture). Saving undoes both
by moving numbers around, never by changing them. So the way back is found by sending the weights themselves through
it: what comes out in the memory of a parameter is that parameter under another name, and what does not is traced by
sending the places of the numbers instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmergeable.checkpoint.disk_names import to_disk_names
from unmergeable.errors import Mismatch

Weights = Mapping[str, Tensor] | nn.Module
"""A state dict by the names on disk, or a live network."""


def weights_of(model: Weights) -> Mapping[str, Tensor]:
    """A state dict as it is, or that of a live network by the names on disk, without copying a parameter.

    Of weights that are tied, the network's files hold one, and so does the result.
    """
    if not isinstance(model, nn.Module):
        return model
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return to_disk_names(model, {name: tensor for name, tensor in model.state_dict().items() if name not in tied})


@dataclass(frozen=True)
class Piece:
    """The flat positions ``on_disk`` of a tensor are those ``inside`` of a parameter; None is all of them in order."""

    parameter: Tensor
    on_disk: Tensor | None = None
    inside: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """Where a tensor on disk lives in a network: its shape on disk, and the parameters that hold it."""

    shape: torch.Size
    pieces: tuple[Piece, ...]

    @property
    def parameter(self) -> Tensor | None:
        """The parameter that is this tensor; None where it is cut out of one, or put together from several."""
        return self.pieces[0].parameter if self.pieces[0].inside is None else None


def find_places(network: Any) -> dict[str, Place]:
    """The place of every tensor that the network's files may hold, by its name on disk."""
    state: dict[str, Tensor] = network.state_dict(keep_vars=True)
    by_memory = {_memory(tensor): name for name, tensor in state.items() if tensor.numel()}
    places: dict[str, Place] = {}
    scattered: list[str] = []
    for name, tensor in to_disk_names(network, {name: tensor.detach() for name, tensor in state.items()}).items():
        owner = by_memory.get(_memory(tensor))
        if owner is not None:
            places[name] = Place(tensor.shape, (Piece(state[owner]),))
        elif name in state:  # without elements, hence without memory to be known by
            places[name] = Place(tensor.shape, (Piece(state[name]),))
        else:
            scattered.append(name)
    if scattered:
        places.update(_trace(network, state, scattered))
    return places


def disk_gradients(places: Mapping[str, Place]) -> dict[str, Tensor]:
    """The gradient of every place, by its name on disk; zeros where there is none."""
    found = {}
    for name, place in places.items():
        gradients = [
            torch.zeros_like(p.parameter) if p.parameter.grad is None else p.parameter.grad for p in place.pieces
        ]
        if place.parameter is not None:
            found[name] = gradients[0]
            continue
        flat = gradients[0].new_empty(place.shape.numel())
        for piece, gradient in zip(place.pieces, gradients, strict=True):
            flat[piece.on_disk] = gradient.reshape(-1)[piece.inside]
        found[name] = flat.reshape(place.shape)
    return found


def show(places: Mapping[str, Place], weights: Mapping[str, Tensor]) -> None:
    """Change a network in place: from now on it computes with ``weights``, by their names on disk.

    A tensor that fills a parameter and has its dtype and device is not copied: the network sees later changes of it.

    Raises:
        Mismatch: the network has no such tensor, or one of another shape.
    """
    for name, tensor in weights.items():
        place = places.get(name)
        if place is None:
            raise Mismatch(f"{name}: the network has no such tensor; its weights belong to another network.")
        if tensor.shape != place.shape:
            raise Mismatch(
                f"{name}: {list(tensor.shape)} where the network has {list(place.shape)}; its weights belong to "
                "another network."
            )
        for piece in place.pieces:
            shown = tensor.detach().to(dtype=piece.parameter.dtype, device=piece.parameter.device)
            if piece.inside is None:
                piece.parameter.data = shown
            else:
                piece.parameter.data.reshape(-1)[piece.inside] = shown.reshape(-1)[piece.on_disk]


@contextmanager
def swapped(network: Any, weights: Mapping[str, Tensor]) -> Iterator[Any]:
    """The network with other weights inside, and with its own again outside. Neither are copied (see :func:`show`).

    Raises:
        Mismatch: as :func:`show` does; the network then has its own weights.
    """
    places = find_places(network)
    pieces = [piece for place in places.values() for piece in place.pieces]
    before = [(piece.parameter, piece.parameter.data) for piece in pieces]
    # Parts of a parameter are written into it, so its own numbers have to be kept elsewhere.
    for parameter in {id(piece.parameter): piece.parameter for piece in pieces if piece.inside is not None}.values():
        parameter.data = parameter.data.clone()
    try:
        show(places, weights)
        yield network
    finally:
        for parameter, data in before:
            parameter.data = data


def _memory(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _trace(network: Any, state: Mapping[str, Tensor], names: list[str]) -> dict[str, Place]:
    """The places of tensors that saving cuts and fuses, by sending the numbers of all weights the same way."""
    starts: list[int] = []
    numbered: dict[str, Tensor] = {}
    count = 0
    for name, tensor in state.items():
        starts.append(count)
        numbered[name] = torch.arange(count, count + tensor.numel()).reshape(tensor.shape)
        count += tensor.numel()
    weights, begins = list(state.values()), torch.tensor(starts)
    on_disk = to_disk_names(network, numbered)
    places = {}
    for name in names:
        numbers = on_disk[name].reshape(-1)
        owners = torch.searchsorted(begins, numbers, right=True) - 1
        pieces = []
        for owner in owners.unique().tolist():
            (there,) = torch.nonzero(owners == owner, as_tuple=True)
            pieces.append(Piece(weights[owner], there, numbers[there] - starts[owner]))
        places[name] = Place(on_disk[name].shape, tuple(pieces))
    return places
