"""Block regression of one live network on another: see :mod:`unmergeable.attacks.block_regression.block_regression`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unmergeable.architecture import Architecture
from unmergeable.architecture.residual import Residual
from unmergeable.attacks.block_regression.fitting import LayerFit, coordinates, fit, movable
from unmergeable.attacks.block_regression.recording import (
    LayerStack,
    Recording,
    call_of,
    first_of,
    given,
    layer_stacks,
    record,
    stream_in,
    stream_of_call,
)
from unmergeable.attacks.block_regression.stream_map import StreamMap, centre, find_map, match_layers, rows_of
from unmergeable.errors import BadInput
from unmergeable.network.disk_weights import Place, find_places, weights_of
from unmergeable.network.encoding import EncodedBatch
from unmergeable.progress import Progress, silent

EXPLAINED = 0.5
"""Share of the base's stream that the release's has to explain, for it to be taken for a fine-tune of the base."""


NEAR = 0.7
"""Relative distance from the base's up to which a mapped embedding of the release is one of the same tokens."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class RegressionResult:
    """``weights`` by their names on disk. ``maps`` and ``places``: of each stack, the release's stream to the base's,
    and behind how many of the release's layers each of the base's places lies. No ``fits`` where it is not recognised.
    """

    weights: Weights
    maps: tuple[StreamMap, ...]
    places: tuple[tuple[int, ...], ...]
    fits: tuple[LayerFit, ...]

    @property
    def is_recognised(self) -> bool:
        return bool(self.fits)

    def median(self, which: Literal["before", "after"]) -> float:
        return median(fit.before if which == "before" else fit.after for fit in self.fits)


def block_regression(
    student: nn.Module,
    teacher: nn.Module,
    architecture: Architecture,
    batches: Sequence[EncodedBatch],
    *,
    tables: Weights | None = None,
    ridge: float = 1e-2,
    steps: int = 12,
    progress: Progress = silent,
) -> RegressionResult:
    """Make ``student`` compute what ``teacher`` computes, in place, and return its weights.

    Args:
        student: the base, live, in evaluation mode; changed.
        teacher: the release, of any structure with the same number of stacks of layers.
        architecture: of the base.
        batches: inputs that both take.
        tables: the release's tensors by the base's names, of which embeddings are used where they are of use.
        ridge: of each fit, as of :class:`~unmergeable.attacks.block_regression.block_regression.BlockRegression`.
        steps: of each fit.
        progress: called with the layers fitted.

    Raises:
        BadInput: no examples; a network does not take them, has no layers to follow, or its activations are not finite.
    """
    if not batches:
        raise BadInput("there are no examples to send through the networks; give some.")
    for module in (*student.modules(), *teacher.modules()):
        if hasattr(module, "config") and hasattr(module.config, "use_cache"):
            module.config.use_cache = False  # or a layer that is called again would see its first call as the past
    theirs, own = record(teacher, batches), record(student, batches)
    stacks = layer_stacks(student)
    if len(theirs.streams) != len(own.streams):
        raise BadInput(
            f"the release has {len(theirs.streams)} runs of layers and the base {len(own.streams)}; recover it by "
            "another method."
        )
    problem = _Problem(student, stacks, batches, _centred(architecture), ridge, steps)
    maps, places = [], []
    for release, base in zip(theirs.streams, own.streams, strict=True):
        ours, wanted = list(rows_of(release)), list(rows_of(base))
        if len(ours[0]) != len(wanted[0]):
            raise BadInput(
                "the release sees another number of tokens or patches than the base; give data both read alike."
            )
        place = match_layers(ours, wanted, is_centred=problem.is_centred)
        places.append(place)
        maps.append(find_map([ours[at] for at in place], wanted, is_centred=problem.is_centred))
    result = RegressionResult(weights_of(student), tuple(maps), tuple(places), ())
    if any(item.unexplained > EXPLAINED for item in maps):
        return result
    fits: list[LayerFit] = []
    done, total = 0, sum(len(stack.layers) for stack in stacks)
    with torch.no_grad():
        for number, stack in enumerate(stacks):
            targets = [
                [maps[number].of(batch, layer) for batch in theirs.streams[number][at]]
                for layer, at in enumerate(places[number])
            ]
            if number == 0:
                _take_tables(student, architecture, tables or {}, maps[0].matrix)
            fits += problem.embedding(stack, targets[0])
            for index in range(len(stack.layers)):
                fits.append(problem.layer(stack, index, targets[index + 1]))
                done += 1
                progress("fitting", done, total, "layers")
        fits += problem.output(theirs)
    return RegressionResult(weights_of(student), tuple(maps), tuple(places), tuple(fits))


def _centred(architecture: Architecture) -> bool:
    """Whether only LayerNorms look at the stream, which subtract what is alike in all coordinates."""
    streams = (*architecture.residuals, *architecture.exposed)
    return bool(streams) and all(_is_seen_by_norms(stream) for stream in streams)


def _is_seen_by_norms(stream: Residual) -> bool:
    """Whether all that looks at the stream is a LayerNorm before a block or at the end."""
    last = stream.norms[-1] if stream.norms else None
    return stream.kind == "layer" and all(not norm.then and (norm.readers or norm is last) for norm in stream.norms)


def _take_tables(student: nn.Module, architecture: Architecture, tables: Weights, matrix: Tensor) -> None:
    """Embeddings of the release, mapped, in the place of the base's where they are near it."""
    places: Mapping[str, Place] = find_places(student)
    for stream in (*architecture.residuals, *architecture.exposed):
        written = {axis.tensor: axis.axis for axis in stream.axes if axis.variance == "vector"}
        blocks = set(architecture.symmetry.tensors_of(architecture.symmetry.select("value_output", "feed_forward")))
        for name, axis in written.items():
            place = places.get(name)
            if name in blocks or name not in tables or place is None or place.parameter is None:
                continue
            base = place.parameter.detach()
            if base.dim() < 2 or tables[name].shape != base.shape or base.shape[axis] != matrix.shape[1]:
                continue
            mapped = (tables[name].float().movedim(axis, -1) @ matrix).movedim(-1, axis)
            if float((mapped - base).norm()) <= NEAR * float(base.norm()):
                place.parameter.copy_(mapped)


@dataclass(frozen=True)
class _Problem:
    """The student with what is asked of it."""

    student: nn.Module
    stacks: tuple[LayerStack, ...]
    batches: Sequence[EncodedBatch]
    is_centred: bool
    ridge: float
    steps: int
    _embeddings: set[str] = field(default_factory=set)

    def embedding(self, stack: LayerStack, targets: Sequence[Tensor]) -> list[LayerFit]:
        """What comes before the first layer, until the stream there is as wanted; what another stack shares, once."""
        names = [name for name in self._outside if name not in self._embeddings]

        def stream(weights: Weights, batch: EncodedBatch) -> Tensor:
            run = partial(functional_call, self.student, dict(weights), (), dict(batch.inputs))
            call = call_of(self.student, stack.layers[0], batch, run)
            return batch.visible(stream_of_call(call.args, call.kwargs))

        used = self._used(names, lambda weights: stream(weights, self.batches[0]))
        self._embeddings.update(used)
        whole = sum(float(self._seen(target - target.mean(0)).square().sum()) for target in targets)

        def losses(weights: Weights) -> Iterator[Tensor]:
            for batch, target in zip(self.batches, targets, strict=True):
                yield self._seen(stream(weights, batch) - target).square().sum() / max(whole, 1e-30)

        return [self._fitted(f"{stack.path} inputs", self.student, used, losses, lambda: None)] if used else []

    @property
    def _outside(self) -> list[str]:
        """The parameters that may be fitted outside of layers."""
        paths = tuple(f"{stack.path}." for stack in self.stacks)
        return [name for name in movable(self.student) if not name.startswith(paths)]

    def _used(self, names: Sequence[str], value: Callable[[Weights], Tensor]) -> list[str]:
        """Those of the parameters that ``value`` depends on."""
        parameters = dict(self.student.named_parameters())
        with torch.enable_grad():
            live = {name: parameters[name].detach().requires_grad_() for name in names}
            result = value(live)
            if result.requires_grad:
                result.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in live.items()}
        return [name for name, gradient in gradients.items() if gradient is not None and bool(gradient.any())]

    def layer(self, stack: LayerStack, index: int, targets: Sequence[Tensor]) -> LayerFit:
        """One layer, on the stream that reaches it."""
        layer = stack.layers[index]
        calls = [call_of(self.student, layer, batch) for batch in self.batches]
        before = [
            batch.visible(stream_of_call(call.args, call.kwargs))
            for batch, call in zip(self.batches, calls, strict=True)
        ]
        lengths = [self._seen(target).norm(dim=-1, keepdim=True) for target in targets]
        middle = float(torch.cat(lengths).median())
        weighed = [1 / length.clamp_min(1e-3 * middle + 1e-30) for length in lengths]
        whole = sum(
            float((self._seen(target - start) * weight).square().sum())
            for target, start, weight in zip(targets, before, weighed, strict=True)
        )

        def losses(weights: Weights) -> Iterator[Tensor]:
            for batch, call, target, weight in zip(self.batches, calls, targets, weighed, strict=True):
                out = stream_in(functional_call(layer, dict(weights), call.args, dict(call.kwargs)))
                away = self._seen(batch.visible(out) - target) * weight
                yield away.square().sum() / max(whole, 1e-30)

        def run() -> None:
            for call in calls:
                layer(*call.args, **call.kwargs)

        return self._fitted(f"{stack.path}.{index}", layer, list(movable(layer)), losses, run)

    def output(self, release: Recording) -> list[LayerFit]:
        """What comes behind the last layer, until outputs are the release's; nothing where they are of other shapes."""
        outputs = release.outputs
        if not outputs:
            return []
        recorded = [self._last_streams(batch) for batch in self.batches]
        with given(self.student, self.stacks) as stand_ins:

            def out(weights: Weights, number: int) -> Tensor:
                for stand_in, stream in zip(stand_ins, recorded[number], strict=True):
                    stand_in.output = stream
                inputs = dict(self.batches[number].inputs)
                return first_of(functional_call(self.student, dict(weights), (), inputs))

            if out({}, 0).shape != outputs[0].shape:
                return []
            paths = tuple(f"{stack.path}." for stack in self.stacks)
            vectors = [name for name, value in self.student.named_parameters() if value.dim() < 2]
            names = [name for name in dict.fromkeys([*vectors, *self._outside]) if not name.startswith(paths)]
            used = self._used([name for name in names if name not in self._embeddings], lambda weights: out(weights, 0))
            if not used:
                return []
            whole = sum(float((target - target.mean(0)).square().sum()) for target in outputs)

            def losses(weights: Weights) -> Iterator[Tensor]:
                for number, target in enumerate(outputs):
                    yield (out(weights, number) - target).square().sum() / max(whole, 1e-30)

            def run() -> None:
                for number in range(len(outputs)):
                    out({}, number)

            return [self._fitted("outputs", self.student, used, losses, run)]

    def _last_streams(self, batch: EncodedBatch) -> list[Any]:
        """What the last layer of each stack returns."""
        found: list[Any] = []
        hooks = [
            stack.layers[-1].register_forward_hook(lambda _, __, output: found.append(output)) for stack in self.stacks
        ]
        try:
            self.student(**batch.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _seen(self, stream: Tensor) -> Tensor:
        return centre(stream, is_centred=self.is_centred)

    def _fitted(
        self,
        name: str,
        module: nn.Module,
        names: Sequence[str],
        losses: Callable[[Weights], Iterator[Tensor]],
        run: Callable[[], None],
    ) -> LayerFit:
        """Fit parameters of a module, and put them into it."""
        moved = coordinates(module, names, run)
        fitted, result = fit(name, moved, losses, ridge=self.ridge, steps=self.steps)
        parameters = dict(module.named_parameters())
        for key, tensor in fitted.items():
            parameters[key].data.copy_(tensor)
        return result
