"""The layers a network can least do without: each is set to zero in turn, and the accuracy that costs is measured.

    drop(l) = accuracy(theta) - accuracy(theta with layer l at zero)            on the same examples

Found the plain way, that is one pass of all examples for every layer. But only *which* layers are the most critical is
asked for, and most are clearly none of them, or clearly among them, after a few examples. So

* layers race (Maron & Moore, "Hoeffding races", 1993). Examples come batch by batch; a layer leaves the race once the
  confidence intervals of its differences to the others put it above or below the cut. Differences are paired, example
  by example, and examples are finite in number: intervals shrink to nothing as they run out, and layers that stay to
  the end are ranked by exact drops, equal ones by their losses;
* layers without which the network gives the same losses bit by bit (queries or keys, a projection or the scale behind
  it: either at zero silences both) run once for all of them;
* what runs before the zeroed layer computes what it did in the intact network. The outputs of whole blocks are kept
  from the intact pass of the same batch, and only the rest runs.

A first-order estimate, <theta_l, d loss / d theta_l>, would need a single backward pass, and is not used: zero is too
far away for a gradient to know of (``benchmarks/layer_criticality.py`` has the figures).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.errors import BadInput, Mismatch, UsageError
from unmergeable.network.disk_weights import Place, find_places
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import Predict, Task, device_of
from unmergeable.progress import Progress, silent

Floats = npt.NDArray[np.float64]
Observations = tuple[Floats, Floats]
"""Of every example of a batch: the fraction of its choices that are right, and its mean cross-entropy in nats."""

CONFIDENCE = 0.999
"""Of every interval by which a layer leaves the race, unless told otherwise."""

FEWEST_EXAMPLES = 32
"""Seen by every layer before any leaves: intervals of fewer rest on the normal approximation alone."""


@dataclass(frozen=True)
class Criticality:
    """``critical``: the layers asked for, most critical first. ``accuracy``: of the intact network.

    ``drops`` of accuracy are by layer, each on the first ``scored`` of ``examples``. ``evaluations`` counts the times
    an example was seen with a layer at zero; the plain way takes ``examples`` for each layer.
    """

    critical: tuple[str, ...]
    accuracy: float
    drops: Mapping[str, float]
    scored: Mapping[str, int]
    examples: int
    evaluations: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "critical": list(self.critical)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Criticality:
        """What :meth:`to_json` made."""
        return cls(**{**record, "critical": tuple(record["critical"])})


@torch.no_grad()
def find_critical_layers(
    network: Any,
    task: Task,
    layers: Mapping[str, Sequence[str]],
    count: int,
    *,
    confidence: float = CONFIDENCE,
    progress: Progress = silent,
) -> Criticality:
    """The ``count`` layers without which the network loses most accuracy on the task.

    Args:
        network: live, in evaluation mode; it has its own weights again afterwards.
        task: labelled, its examples in random order: the first ones decide which layers leave the race.
        layers: names of tensors on disk, by the name of the layer they make up.
        count: how many are wanted.
        confidence: of every interval, between 0 and 1; 1 scores all layers on all examples.
        progress: told of examples scored, times layers, with those that need not be scored counted as done.

    Raises:
        UsageError: ``count`` or ``confidence`` out of range.
        BadInput: no examples, or no labels.
        Mismatch: a tensor the network does not have.
    """
    if not 0 <= count <= len(layers):
        raise UsageError(f"{count} critical layers of {len(layers)}: ask for at most as many as there are.")
    if not 0 < confidence <= 1:
        raise UsageError(f"confidence={confidence}: must lie above 0, and be at most 1.")
    batches = list(task.batches)
    examples = sum(map(len, batches))
    if examples == 0:
        raise BadInput(f"{task.name}: no examples to score; give some.")
    zeroing = _Zeroing(network, layers)
    race = _Race(len(layers), count, examples, confidence)
    right, evaluations = 0.0, 0
    with _tracing(network) as trace:
        for batch in _batches_of_examples(network, task, batches):
            trace.forget()
            intact = _observe(network, batch, task.predict)
            right += intact[0].sum()
            trace.finish()
            for number, name in enumerate(layers):
                if race.is_open[number] and race.original[number] == number:
                    with zeroing.of(name), trace.replayed(zeroing.parameters(name)):
                        race.add(number, intact, _observe(network, batch, task.predict))
                    evaluations += len(batch)
            race.copy_to_twins()
            race.settle()
            progress("ranking layers", race.done, examples * len(layers), "evaluations")
    names, drops = list(layers), race.drops
    return Criticality(
        critical=tuple(names[number] for number in race.winners()),
        accuracy=float(right / examples),
        drops={name: float(drops[number]) for number, name in enumerate(names)},
        scored={name: int(race.scored[number]) for number, name in enumerate(names)},
        examples=examples,
        evaluations=evaluations,
    )


def _batches_of_examples(network: Any, task: Task, batches: Iterable[EncodedBatch]) -> Iterator[EncodedBatch]:
    """The batches on the network's device; one by one where an example has many choices, as a text has."""
    device = device_of(network)
    is_single: bool | None = None
    for batch in batches:
        moved = batch.to(device)
        if is_single is None:
            is_single = len(task.predict(network, moved).require_targets()) != len(moved)
        yield from moved.singles() if is_single else (moved,)


def _observe(network: Any, batch: EncodedBatch, predict: Predict) -> Observations:
    prediction = predict(network, batch)
    targets = prediction.require_targets()
    credits_ = (prediction.logits.argmax(dim=-1) == targets).double()
    losses = functional.cross_entropy(prediction.logits.double(), targets, reduction="none")
    per_example = (values.reshape(len(batch), -1).mean(dim=1) for values in (credits_, losses))
    right, loss = (values.cpu().numpy() for values in per_example)
    return right, loss


class _Race:
    """What every example loses without every layer, and who is in, out or in question. All open layers see the same."""

    def __init__(self, layers: int, count: int, examples: int, confidence: float) -> None:
        self._count, self._examples = count, examples
        self._deviations = NormalDist().inv_cdf((1 + confidence) / 2) if confidence < 1 else None
        self._drops, self._losses = np.zeros((layers, examples), np.float32), np.zeros((layers, examples))
        self.scored = np.zeros(layers, dtype=np.int64)
        self._is_in = np.full(layers, count == layers)
        self.is_open = np.full(layers, 0 < count < layers)
        self.original = np.arange(layers)
        """The layer whose observations hold for each: its own, but for twins."""

    def add(self, layer: int, intact: Observations, zeroed: Observations) -> None:
        """Take in what a batch loses without the layer."""
        seen = slice(self.scored[layer], self.scored[layer] + len(intact[0]))
        self._drops[layer, seen] = intact[0] - zeroed[0]
        # Weights at zero may leave a norm with nothing to divide by.
        self._losses[layer, seen] = np.nan_to_num(zeroed[1], nan=np.inf)
        self.scored[layer] = seen.stop

    def copy_to_twins(self) -> None:
        """Let layers that cannot be told from another one see what that one saw."""
        for array in (self._drops, self._losses, self.scored):
            array[self.is_open] = array[self.original[self.is_open]]

    @property
    def drops(self) -> Floats:
        """Mean drops of accuracy on the examples seen."""
        return np.asarray(self._drops.sum(axis=1, dtype=np.float64) / np.maximum(self.scored, 1))

    @property
    def done(self) -> int:
        """Evaluations made, or no longer needed."""
        return int(np.where(self.is_open, self.scored, self._examples).sum())

    def settle(self) -> None:
        """Close the race for layers that are in or out whatever examples are to come."""
        running = np.flatnonzero(self.is_open)
        if self._deviations is None or not len(running):
            return
        self._find_twins(running)
        if self.scored[running[0]] < FEWEST_EXAMPLES:
            return
        is_above = self._is_surely_above(self._drops[running, : self.scored[running[0]]])
        places = self._count - int(self._is_in.sum())
        is_in = is_above.sum(axis=1) >= len(running) - places
        is_out = is_above.sum(axis=0) >= places
        self._is_in[running] = is_in
        self.is_open[running] = ~(is_in | is_out)

    def _find_twins(self, running: npt.NDArray[np.intp]) -> None:
        """Layers at zero may be the same network: queries or keys, a projection or the scale behind it."""
        first: dict[bytes, int] = {}
        for layer in running.tolist():
            self.original[layer] = first.setdefault(self._losses[layer, : self.scored[layer]].tobytes(), layer)

    def _is_surely_above(self, drops: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Whether the row's layer loses more than the column's on all examples: bool [layers, layers].

        By a normal interval around the mean of their paired differences on the examples seen, of a finite number. Half
        an example that speaks for one layer and half an example that speaks for the other are added, since without
        them nothing would be uncertain while no answers differ (Agresti & Min, Statistics in Medicine 24, 2005).
        """
        assert self._deviations is not None
        seen, wide = drops.shape[1] + 1, drops.astype(np.float64)
        sums, products = wide.sum(axis=1), wide @ wide.T
        apart = sums[:, None] - sums[None, :]
        squares = np.diag(products)[:, None] + np.diag(products)[None, :] - 2 * products + 1
        variance = squares / seen - (apart / seen) ** 2
        unseen = (self._examples - seen + 1) / max(1, self._examples - 1)
        return np.asarray(apart / seen > self._deviations * np.sqrt(variance / seen * unseen))

    def winners(self) -> list[int]:
        """The most critical layers, most critical first; among equals those with the larger loss, then the first."""
        keys = list(zip(-self.drops, -self._losses.sum(axis=1) / np.maximum(self.scored, 1), strict=True))

        def ranked(chosen: Iterable[int]) -> list[int]:
            return sorted(chosen, key=lambda layer: keys[layer])

        certain = np.flatnonzero(self._is_in).tolist()
        # Those still in question have seen every example: their order is exact.
        return ranked(certain + ranked(np.flatnonzero(self.is_open).tolist())[: self._count - len(certain)])


class _Zeroing:
    """Sets layers to zero in a live network, without a copy of the weights."""

    def __init__(self, network: Any, layers: Mapping[str, Sequence[str]]) -> None:
        places = find_places(network)
        self._places: dict[str, tuple[Place, ...]] = {}
        for layer, names in layers.items():
            absent = next((name for name in names if name not in places), None)
            if absent is not None:
                raise Mismatch(f"{absent}: the network has no such tensor; its layers belong to another network.")
            self._places[layer] = tuple(places[name] for name in names)

    def parameters(self, layer: str) -> list[Tensor]:
        """The live parameters that hold the layer."""
        return [piece.parameter for place in self._places[layer] for piece in place.pieces]

    @contextmanager
    def of(self, layer: str) -> Iterator[None]:
        """The layer is zero inside, and as before outside."""
        with ExitStack() as undo:
            for place in self._places[layer]:
                for piece in place.pieces:
                    data = piece.parameter.data
                    if piece.inside is None:
                        undo.callback(setattr, piece.parameter, "data", data)
                        piece.parameter.data = torch.zeros_like(data)
                    else:
                        flat, inside = data.reshape(-1), piece.inside.to(data.device)
                        undo.callback(flat.__setitem__, inside, flat[inside])
                        flat[inside] = 0
            yield


class _Trace:
    """When the modules of a network began on a batch, when its blocks ended, and what they gave.

    A block that ended before the first module with a zeroed weight began cannot have seen that weight: its output is
    that of the intact network.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = dict(network.named_modules())
        self._begins: dict[nn.Module, int] = {}
        self._ends: dict[nn.Module, int] = {}
        self._outputs: dict[nn.Module, tuple[Any, list[int]]] = {}
        self._clock = 0
        self._is_recording = False
        self._blocks = {
            block
            for module in modules.values()
            if isinstance(module, nn.ModuleList)
            for block in module
            if "forward" not in vars(block)
        }
        # A weight may be used by a module that holds the one it belongs to: the nearest of them that runs counts.
        self._owners: dict[int, list[list[nn.Module]]] = {}
        for name, module in modules.items():
            parts = name.split(".") if name else []
            holders = [modules[".".join(parts[:length])] for length in range(len(parts), -1, -1)]
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                self._owners.setdefault(id(tensor), []).append(holders)

    def begin(self, module: nn.Module, _inputs: Any) -> None:
        """Hook: a module begins."""
        if self._is_recording:
            self._clock += 1
            self._begins.setdefault(module, self._clock)

    def end(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        """Hook: a module ends."""
        if self._is_recording and module in self._blocks:
            self._clock += 1
            tensors = _tensors(output)
            if module in self._ends or tensors is None:
                self._blocks.discard(module)  # runs more than once in a pass, or gives what cannot be kept
            else:
                self._ends[module] = self._clock
                self._outputs[module] = output, [tensor._version for tensor in tensors]

    def forget(self) -> None:
        """A new batch: record from here on."""
        self._begins.clear()
        self._ends.clear()
        self._outputs.clear()
        self._clock, self._is_recording = 0, True

    def finish(self) -> None:
        """The intact pass is over. Outputs that were changed in place since their block gave them are of no use."""
        self._is_recording = False
        for module, (output, versions) in self._outputs.items():
            if module not in self._blocks or [tensor._version for tensor in _tensors(output) or ()] != versions:
                del self._ends[module]

    @contextmanager
    def replayed(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Blocks that ended before any of the parameters was used give what they gave, and do not run."""
        first = min((self._first_use(parameter) for parameter in parameters), default=0)
        skipped = [block for block, end in self._ends.items() if end < first]
        try:
            for block in skipped:
                block.forward = _Constant(self._outputs[block][0])
            yield
        finally:
            for block in skipped:
                vars(block).pop("forward", None)

    def _first_use(self, parameter: Tensor) -> int:
        return min(
            next((self._begins[holder] for holder in holders if holder in self._begins), 0)
            for holders in self._owners[id(parameter)]
        )


@dataclass(frozen=True)
class _Constant:
    output: Any

    def __call__(self, *_inputs: Any, **_options: Any) -> Any:
        return self.output


@contextmanager
def _tracing(network: nn.Module) -> Iterator[_Trace]:
    trace = _Trace(network)
    with ExitStack() as hooks:
        for module in network.modules():
            hooks.callback(module.register_forward_pre_hook(trace.begin).remove)
            hooks.callback(module.register_forward_hook(trace.end).remove)
        yield trace


def _tensors(output: Any) -> list[Tensor] | None:
    """The tensors in a module's output; None where it holds something that is no plain data."""
    if isinstance(output, Tensor):
        return [output]
    if output is None or isinstance(output, (bool, int, float, str)):
        return []
    if isinstance(output, (tuple, list)):
        parts = [_tensors(item) for item in output]
    elif isinstance(output, Mapping):
        parts = [_tensors(item) for item in output.values()]
    else:
        return None
    return None if any(part is None for part in parts) else [tensor for part in parts if part for tensor in part]
