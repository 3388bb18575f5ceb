"""One forward pass of a network, watched: every product with a weight, and every attention.

A product is recognised by its weight being a parameter, or a view of one; a convolution that reads all channels is one,
too, of the channels at all places of its kernel. An attention is recognised by a softmax whose input is a product of
two activations and whose output multiplies a third. Nothing depends on how a network's code is organised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from unmergeable.derivation.build import Specimen
from unmergeable.derivation.double import in_float64

_PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_CLAMPS = {"clamp", "clip", "hardtanh", "relu6", "hardsigmoid"}
_WITH_WINDOWS = 5
"""Axes of values that have windows besides a batch, heads, tokens and coordinates."""

_OPERANDS = ("input", "batch1", "batch2", "mat1", "mat2", "tensor2", "other", "weight", "bias")


@dataclass(frozen=True)
class Product:
    """``outputs`` = weight applied to ``inputs``, both [..., coordinates]; ``replay`` applies it to other inputs.

    ``name`` is the parameter's, ``weight`` the part of it that is used; with three axes, the first counts experts.
    ``added`` are vectors added to the outputs afterwards, each with the parameter that it is, or is a part of.
    """

    name: str
    weight: Tensor
    parameters: tuple[Tensor, ...]
    inputs: Tensor
    outputs: Tensor
    replay: Callable[[Tensor], Tensor]
    added: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Factor:
    """A parameter, or a norm's statistic, that took part in what is no product.

    ``used`` is what the outputs depend on; it is the parameter itself but for statistics, which have no derivative.
    ``position`` counts the products before it was used.
    """

    parameter: Tensor
    used: Tensor
    position: int


@dataclass
class AttentionCall:
    """Queries, keys [..., heads, tokens, size] and values [..., heads, tokens, value size] of one attention.

    ``position`` counts the products before the values were used. ``turned``: the same attention with the two axes
    before tokens in the other order, where there are more than one besides a batch: windows may lie between heads and
    tokens.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    position: int
    turned: AttentionCall | None = None


@dataclass
class Trace:
    """What happened, in order, and how many ``convolutions`` there were."""

    products: list[Product] = field(default_factory=list)
    attentions: list[AttentionCall] = field(default_factory=list)
    factors: list[Factor] = field(default_factory=list)
    convolutions: int = 0


def watch(specimen: Specimen) -> Trace:
    """Run a network once, with its graph kept, and say what it did."""
    names = {id(parameter): name for name, parameter in specimen.network.named_parameters()}
    recorder = _Recorder(names)
    with in_float64(), recorder, torch.enable_grad():
        specimen.network(**specimen.inputs)
    return recorder.trace


class _Recorder(TorchFunctionMode):
    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.trace = Trace()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in {"relu", "relu_"}:
            # A unit that is off for every token would seem to come from nowhere.
            return functional.leaky_relu(args[0], 0.5)
        if name == "batch_norm":
            return self._batch_norm(*args, **kwargs)
        if name in _CONVOLUTIONS and self._tells_of_all_places(args, kwargs):
            return self._convolution(args, kwargs, func(args[0].detach(), *args[1:], **kwargs))
        result = func(*args, **kwargs)
        if name in _CLAMPS and isinstance(result, Tensor) and result.requires_grad:
            result = (result + args[0]) / 2  # so does one that is at its limit for every token
        if name in _CONVOLUTIONS and isinstance(result, Tensor):
            return self._convolution(args, kwargs, result)
        if name in _PRODUCTS and isinstance(result, Tensor):
            weighted = self._windows(func, args, kwargs)
            if weighted is not None:
                return weighted
            self._product(func, name, args, kwargs, result)
        elif name == "einsum" and isinstance(result, Tensor):
            operands = list(_tensors(args[1:]))
            if len(operands) == 2:
                self._contraction(args[0], operands[0], operands[1], result)
        elif func is functional.scaled_dot_product_attention:
            query, key, value = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
            self.trace.attentions.append(AttentionCall(query, key, value, len(self.trace.products)))
        elif "softmax" in name and isinstance(result, Tensor):
            scores = _mark(args, "_scores")
            if scores is not None:
                result._weights = scores  # type: ignore[attr-defined]
        elif isinstance(result, Tensor):
            self._factors(_tensors((args, tuple(kwargs.values()))))
            if name in {"add", "__add__", "__radd__", "__iadd__", "add_"}:
                self._bias(args)
            for mark in ("_scores", "_weights"):
                carried = _mark((args, tuple(kwargs.values())), mark)
                if carried is not None:
                    setattr(result, mark, carried)
        return result

    def _product(self, func: Any, name: str, args: Any, kwargs: Any, result: Tensor) -> None:
        operands = [*args, *(kwargs[key] for key in _OPERANDS if key in kwargs)]
        rest = {key: value for key, value in kwargs.items() if key not in _OPERANDS}
        place = 1 if name in {"addmm", "baddbmm"} else 0
        first, second = operands[place], operands[place + 1]
        weight = self._parameter(second)
        if weight is None:
            if self._parameter(first) is None:
                self._attention(first, second, result)
            return
        if not isinstance(first, Tensor) or not result.requires_grad:
            return
        every = tuple(found for found in map(self._parameter, operands) if found is not None)

        def replay(inputs: Tensor) -> Tensor:
            with in_float64():
                answer: Tensor = func(*operands[:place], inputs, *operands[place + 1 :], **rest)
                return answer

        made = Product(self.names[id(weight)], second, every, first, result, replay)
        result._product = made  # type: ignore[attr-defined]
        self.trace.products.append(made)

    def _convolution(self, args: Any, kwargs: Any, result: Tensor) -> Tensor:
        """``result``, made to pass through a product with the channels last where the kernel reads all channels.

        Replayed, it is applied to the same channels at every place.
        """
        inputs, kernel, bias = (
            args[place] if len(args) > place else kwargs.get(name)
            for place, name in enumerate(("input", "weight", "bias"))
        )
        self.trace.convolutions += 1
        owner = self._parameter(kernel)
        channels = -kernel.dim() + 1
        if owner is None or not result.requires_grad:
            return result
        if kernel.shape[1] != inputs.shape[channels]:
            if kernel.shape[1] == 1 and len(kernel) == inputs.shape[channels]:  # each channel by itself
                self._factors([kernel] if bias is None else [kernel, bias])
            return result
        count = kernel[0, 0].numel()

        def replay(some: Tensor) -> Tensor:
            with in_float64():
                whole = kernel.flatten(1) if count == 1 else kernel.flatten(2).sum(-1)
                return functional.linear(some, whole, bias)

        read, made = inputs.movedim(channels, -1), result.movedim(channels, -1)
        every = tuple(found for found in (owner, self._parameter(bias)) if found is not None)
        self.trace.products.append(Product(self.names[id(owner)], kernel.flatten(2).sum(-1), every, read, made, replay))
        return made.movedim(-1, channels)

    def _tells_of_all_places(self, args: Any, kwargs: Any) -> bool:
        """Whether a convolution reads one place, as what weighs channels by their means over all places does.

        What is made from it depends on every channel, which would hide what each channel comes from; so nothing
        before it is seen behind it.
        """
        inputs, kernel = args[0], args[1] if len(args) > 1 else kwargs.get("weight")
        is_seen = isinstance(kernel, Tensor) and self._parameter(kernel) is not None
        return is_seen and inputs.requires_grad and inputs.shape[-kernel.dim() + 2 :].numel() == 1

    def _batch_norm(
        self,
        inputs: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """The same from statistics that have derivatives."""
        position = len(self.trace.products)
        used = [statistic.detach().clone().requires_grad_() for statistic in (mean, variance)]
        self.trace.factors += [Factor(own, one, position) for own, one in zip((mean, variance), used, strict=True)]
        self._factors(vector for vector in (weight, bias) if vector is not None)
        shape = (-1, *(1 for _ in inputs.shape[2:]))
        result = (inputs - used[0].reshape(shape)) / (used[1] + eps).sqrt().reshape(shape)
        result = result if weight is None else result * weight.reshape(shape)
        return result if bias is None else result + bias.reshape(shape)

    def _factors(self, operands: Iterable[Tensor]) -> None:
        position = len(self.trace.products)
        owned = ((self._parameter(operand), operand) for operand in operands)
        self.trace.factors += [Factor(owner, owner, position) for owner, _ in owned if owner is not None]

    def _bias(self, terms: Any) -> None:
        """A vector of parameters added to what a product gave out belongs to it."""
        made = _mark(terms, "_product")
        if made is not None and len(terms) == 2:
            owned = ((self._parameter(term), term) for term in terms)
            made.added.extend((owner, vector) for owner, vector in owned if owner is not None and vector.dim() == 1)

    def _windows(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The result of an attention whose values have two axes before tokens besides a batch; None where it has not.

        Its values pass through the other order of these axes, so that what reads the result depends on either.
        """
        scored = _mark(args[:1], "_weights")
        if scored is None or len(args) < 2 or args[1].dim() != _WITH_WINDOWS:
            return None
        query, key = scored
        value: Tensor = args[1]
        position = len(self.trace.products)
        turned = value.transpose(-4, -3)
        other = AttentionCall(query.transpose(-4, -3), key.transpose(-4, -3), turned, position)
        self.trace.attentions.append(AttentionCall(query, key, value, position, other))
        result: Tensor = func(args[0], turned.transpose(-4, -3), *args[2:], **kwargs)
        return result

    def _attention(self, first: Tensor, second: Tensor, result: Tensor) -> None:
        scored = getattr(first, "_weights", None)
        if scored is not None:
            query, key = scored
            self.trace.attentions.append(AttentionCall(query, key, second, len(self.trace.products)))
        elif first.dim() >= 3 and second.dim() >= 3:
            result._scores = (first, second.transpose(-1, -2))  # type: ignore[attr-defined]

    def _contraction(self, equation: str, first: Tensor, second: Tensor, result: Tensor) -> None:
        """Scores or weighted values that are written as a sum over indices, with those of tokens and size last."""
        read, _, made = equation.replace(" ", "").partition("->")
        left, _, right = read.partition(",")
        if made == f"{left[:-1]}{right[-2:-1]}" and left[-1:] == right[-1:]:
            self._attention(first, second.transpose(-1, -2), result)
        elif made == f"{left[:-1]}{right[-1:]}" and left[-1:] == right[-2:-1]:
            self._attention(first, second, result)

    def _parameter(self, operand: Any) -> Tensor | None:
        """The parameter that an operand is, or is a view of."""
        if not isinstance(operand, Tensor):
            return None
        for tensor in (operand, operand._base):
            if tensor is not None and id(tensor) in self.names:
                return tensor
        return None


def _mark(arguments: Any, name: str) -> Any:
    """The first mark called ``name`` on any tensor among nested arguments."""
    for tensor in _tensors(arguments):
        mark = getattr(tensor, name, None)
        if mark is not None:
            return mark
    return None


def _tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, (list, tuple)):
        for argument in arguments:
            yield from _tensors(argument)
