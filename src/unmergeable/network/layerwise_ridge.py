"""Output projections of blocks fitted to another network's, from one pass over unlabelled inputs.

See :mod:`unmergeable.attacks.layerwise_ridge` for the idea. Second moments are gathered in float64, batch by batch;
where those of all layers do not fit the memory budget, in as many passes as they need.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmergeable.architecture import Architecture
from unmergeable.attacks.layerwise_ridge import LayerwiseRidge, block_tensors, fit_projection, stream_writers
from unmergeable.errors import BadInput
from unmergeable.network.disk_weights import find_places, show, swapped
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.input_grams import MEMORY_BUDGET, LinearLayer, linear_layers
from unmergeable.network.tasks import Task, answer, device_of
from unmergeable.progress import Progress, silent

Outputs = Mapping[str, deque[Tensor]]
"""What a network's projections put out for one batch, by their names on disk, call by call."""


@dataclass(frozen=True)
class ProjectionFit:
    """Distance of a projection's outputs to the protected ones, relative to these: with the base's weights, and fitted.

    Both see the protected network's stream through the base's readers.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class LayerwiseRidgeResult:
    """``weights`` by their names on disk. ``skipped``: projections that are no linear layer, and stay the base's."""

    weights: Mapping[str, Tensor]
    fits: tuple[ProjectionFit, ...]
    skipped: tuple[str, ...]


@torch.no_grad()
def layerwise_ridge(
    network: Any,
    protected: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    architecture: Architecture,
    task: Task,
    method: LayerwiseRidge,
    *,
    teacher: Any = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress = silent,
) -> LayerwiseRidgeResult:
    """The base with the protected network's tensors along the stream, and its projections fitted.

    Args:
        network: of the base's architecture; it has its own weights again afterwards.
        protected: weights by the base's names on disk; with a ``teacher`` only those that the base has in this shape.
        base: weights by their names on disk; a head that it lacks is taken from ``protected``.
        architecture: of the base.
        task: its inputs; neither labels nor how the output is read matter.
        method: the settings.
        teacher: the live protected network, where its structure is not the base's; None to show ``protected`` to
            ``network``.
        memory_budget: bytes of second moments gathered at a time.
        progress: told of the examples seen.

    Raises:
        BadInput: there are no examples, a network does not take them, or its activations are not finite.
        Mismatch: the weights do not belong to the network.
    """
    method.validate()
    inside, writers = block_tensors(architecture), stream_writers(architecture)
    student = {name: base[name] if name in inside else tensor for name, tensor in {**base, **protected}.items()}
    with swapped(network, student):
        places = find_places(network)
        layers = {layer.name: layer for layer in linear_layers(network) if layer.name in writers}
        paths = {module: path for path, module in network.named_modules()}
        taught = {
            name: layer.module if teacher is None else teacher.get_submodule(paths[layer.module])
            for name, layer in layers.items()
        }

        def outputs_of(batch: EncodedBatch) -> Outputs:
            if teacher is not None:
                return _outputs(teacher, taught, batch)
            show(places, protected)
            found = _outputs(network, taught, batch)
            show(places, student)
            return found

        fitted: dict[str, Tensor] = {}
        fits: list[ProjectionFit] = []
        for group in _groups(layers, memory_budget):
            for name, moments in _gather(network, layers, group, task, outputs_of, progress).items():
                tensors, fit = _fit(layers[name], moments, student, method.ridge)
                fitted |= tensors
                fits.append(fit)
    skipped = tuple(name for name in writers if name not in layers)
    return LayerwiseRidgeResult({**student, **fitted}, tuple(fits), skipped)


@dataclass(frozen=True)
class _Moments:
    """Sums over rows, in float64; a bias is one more input that is always 1.

    ``gram`` [inputs, inputs] and ``cross`` [inputs, outputs]; ``energy`` [1], of the outputs; ``rows`` [1].
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    rows: Tensor

    @classmethod
    def of(cls, layer: LinearLayer) -> _Moments:
        """Nothing seen yet."""
        inputs, outputs = _sizes(layer)
        weight: Any = layer.module.weight
        shapes = ((inputs, inputs), (inputs, outputs), (1,), (1,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=weight.device) for shape in shapes))

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Rows of inputs and outputs of the same length, without the input of the bias."""
        inputs, outputs = inputs.double(), outputs.double()
        if inputs.shape[1] < len(self.gram):
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(inputs.T, outputs)
        self.energy.add_(outputs.square().sum())
        self.rows.add_(len(inputs))

    def distance(self, weight: Tensor) -> float:
        """|X W - Y| / |Y| of a weight [inputs, outputs]; 0 where nothing was put out."""
        squared = self.energy + ((self.gram @ weight - 2 * self.cross) * weight).sum()
        # Of a perfect fit nothing is left but rounding, which may be negative.
        return float((squared.clamp_min(0) / self.energy.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())


def _sizes(layer: LinearLayer) -> tuple[int, int]:
    """Inputs, that of the bias included, and outputs."""
    weight: Any = layer.module.weight
    return layer.inputs + (layer.module.bias is not None), int(weight.shape[1 - layer.axis])


def _groups(layers: Mapping[str, LinearLayer], memory_budget: int) -> Iterator[list[str]]:
    """Names of layers whose moments fit the budget together; a layer that does not fit alone is a group."""
    group: list[str] = []
    size = 0
    for name, layer in layers.items():
        inputs, outputs = _sizes(layer)
        nbytes = 8 * inputs * (inputs + outputs)
        if group and size + nbytes > memory_budget:
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes
    if group:
        yield group


def _gather(
    network: Any,
    layers: Mapping[str, LinearLayer],
    group: Sequence[str],
    task: Task,
    outputs_of: Callable[[EncodedBatch], Outputs],
    progress: Progress,
) -> dict[str, _Moments]:
    """Moments of the layers of ``group``: their inputs here, on the stream that the other network's outputs make."""
    moments = {name: _Moments.of(layers[name]) for name in group}
    seen = 0
    for batch in task.batches:
        outputs = outputs_of(batch)
        with _forced(layers, outputs, moments, batch):
            answer(network, batch.to(device_of(network)))
        seen += len(batch)
        progress(f"outputs of blocks: {task.name}", seen, 0, "examples")  # of how many is not known
    if seen == 0:
        raise BadInput(f"{task.name}: no examples to send through the networks; give some.")
    for name, its in moments.items():
        if not bool(its.gram.isfinite().all() and its.cross.isfinite().all()):
            raise BadInput(f"{name}: its inputs or outputs on {task.name} are not finite; use float32.")
    return moments


def _outputs(network: Any, modules: Mapping[str, nn.Module], batch: EncodedBatch) -> Outputs:
    """What each of the modules puts out."""
    found: dict[str, deque[Tensor]] = {name: deque() for name in modules}
    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_hook(lambda _, __, output, name=name: found[name].append(output))
            hooks.callback(hook.remove)
        answer(network, batch.to(device_of(network)))
    return found


@contextmanager
def _forced(
    layers: Mapping[str, LinearLayer], outputs: Outputs, moments: Mapping[str, _Moments], batch: EncodedBatch
) -> Iterator[None]:
    """Inside, every layer puts out what the other network's did; what goes in is added to its moments."""
    mask = batch.inputs.get("attention_mask")

    def rows(tensor: Tensor) -> Tensor:
        if mask is not None and tensor.dim() == 3 and tensor.shape[:2] == mask.shape:
            tensor = tensor[mask.bool().to(tensor.device)]
        return tensor.reshape(-1, tensor.shape[-1])

    def force(name: str, inputs: Tensor) -> Tensor:
        output = outputs[name].popleft()
        if name in moments:
            moments[name].add(rows(inputs), rows(output))
        return output

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.module.register_forward_hook(lambda _, inputs, __, name=name: force(name, inputs[0]))
            hooks.callback(hook.remove)
        yield


def _fit(
    layer: LinearLayer, moments: _Moments, student: Mapping[str, Tensor], ridge: float
) -> tuple[dict[str, Tensor], ProjectionFit]:
    """Weight and bias of a layer by their names on disk, and how near they come."""
    weight, bias = layer.name, layer.name.removesuffix("weight") + "bias"
    stored = student[weight].to(moments.gram)
    start = stored.T if layer.axis == 1 else stored
    if layer.module.bias is not None:
        start = torch.cat([start, student[bias].to(start)[None]])
    rows = moments.rows.clamp_min(1)
    fitted = fit_projection(moments.gram / rows, moments.cross / rows, start, ridge)
    fit = ProjectionFit(weight, moments.distance(start), moments.distance(fitted))
    found = {}
    if layer.module.bias is not None:
        fitted, found[bias] = fitted[:-1], fitted[-1].to(student[bias])
    found[weight] = (fitted.T if layer.axis == 1 else fitted).contiguous().to(student[weight])
    return found, fit
