"""``layerwise_ridge``: fit the base's layers to what the protected network's layers put out, on unlabelled inputs.

    W = argmin over W of  |X W - Y|^2 / rows + mu |W - W_0|^2,   mu = ridge * mean diagonal of X^T X / rows
      = W_0 + (X^T X / rows + mu I)^-1 (X^T Y / rows - (X^T X / rows) W_0)

What a block computes inside, it computes in a basis of its own, and that is where protections hide it: a query, a value
or a hidden unit of the protected network cannot be compared with the base's. What a block *adds to the residual stream*
can: whatever is done to the inside, the next layers have to understand it. So

    Y     what the output projection of a block (attention output, feed-forward down) puts out in the protected network
    X     what goes into that projection when the base's own block sees the protected network's stream
    W_0   the base's projection, and with it its bias

The readers of each block stay the base's, hence X is in the base's basis, and so is the W that turns it into Y. Every
block is shown the stream as the protected network leaves it (teacher forcing), which makes the layers independent: one
pass over the data gives them all, and errors do not add up from layer to layer while fitting.

Readers are not fitted. Their outputs exist only in the hidden basis, and aligning that to the base's freely gives the
base back: from fewer inputs than hidden units, a linear map turns any features into any others. Where the hiding is a
known symmetry, ``nearest_orbit`` restores the readers too and needs no data; this attack needs nothing to be known, and
takes polynomials as well as keys.

Second moments are gathered in float64, batch by batch; where those of all layers do not fit the memory budget, in as
many passes as they need.

Tensors that lie along the stream alone (embeddings, norms, heads) are the protected network's. The stream itself must
be in the base's basis; after a protection that turns it, run ``nearest_orbit`` first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unmergeable.architecture import Architecture
from unmergeable.architecture.blocks import output_bias, output_weight
from unmergeable.attacks.base import AttackRequirements, Inputs, Recovered
from unmergeable.attacks.live import edits_to, is_polynomial, load, state_for
from unmergeable.errors import BadInput, UsageError
from unmergeable.network.disk_weights import find_places, show, swapped
from unmergeable.network.encoding import EncodedBatch, grouped
from unmergeable.network.linear_layers import MEMORY_BUDGET, LinearLayer, linear_layers
from unmergeable.network.tasks import Task, answer, device_of
from unmergeable.polynomials.layout import under_names_on_disk
from unmergeable.progress import Progress, silent

Outputs = Mapping[str, deque[Tensor]]
"""What a network's projections put out for one batch, by their names on disk, call by call."""


@dataclass(frozen=True)
class LayerwiseRidge:
    """Settings of the attack.

    Attributes:
        ridge: pull towards the base, relative to the mean square of the inputs.
        examples: the most that are read.
        seed: of which.
    """

    name: ClassVar[str] = "layerwise_ridge"
    summary: ClassVar[str] = "fit the base's output projections to what the protected blocks add to the residual stream"

    ridge: float = 1e-2
    examples: int = 1000
    seed: int = 0

    def validate(self) -> None:
        if not 0 < self.ridge < math.inf:
            raise UsageError(f"ridge={self.ridge}: must be positive, or what the inputs leave open has no answer.")
        if self.examples < 1:
            raise UsageError(f"examples={self.examples}: at least one is needed.")

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(needs=("base", "data"), structure="polynomial")

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Fit the base's projections to the protected network; the result has the base's structure.

        Raises:
            UsageError: the examples come with a head, which would not be read.
            BadInput: the examples cannot be used.
        """
        data = inputs.require_data(self.name)
        if data.head is not None:
            raise UsageError("layerwise_ridge looks at the residual stream alone, and reads no head; leave out --head.")
        task = data.unlabelled(examples=self.examples, seed=self.seed)
        template = inputs.base if is_polynomial(inputs.protected) else inputs.protected
        network = load(template)
        teacher = None if template is inputs.protected else load(inputs.protected)
        fitted = layerwise_ridge(
            network,
            state_for(network, under_names_on_disk(inputs.protected)),
            state_for(network, inputs.base),
            inputs.architecture,
            task,
            self,
            teacher=teacher,
            progress=progress,
        )
        learnt = Fitted(data.path, fitted.fits, fitted.skipped)
        return Recovered(template, edits_to(fitted.weights, template), learnt=learnt)


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


@dataclass(frozen=True)
class Fitted:
    """How near the projections came, on the examples in ``data``; ``skipped`` as in :class:`LayerwiseRidgeResult`."""

    data: Path
    fits: tuple[ProjectionFit, ...]
    skipped: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"data": str(self.data), "fits": [asdict(fit) for fit in self.fits], "skipped": list(self.skipped)}

    def lines(self) -> list[str]:
        if not self.fits:
            return []
        before, after = median(fit.before for fit in self.fits), median(fit.after for fit in self.fits)
        lines = [
            f"Fitted {len(self.fits)} projections: relative distance of their outputs to the protected ones "
            f"{before:.3g} before, {after:.3g} after (median)"
        ]
        return [*lines, *([f"Left as in the base: {', '.join(self.skipped)}"] if self.skipped else [])]


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
        progress: called with the examples seen.

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
            outputs = _outputs(network, taught, batch)
            show(places, student)
            return outputs

        fitted: dict[str, Tensor] = {}
        fits: list[ProjectionFit] = []
        for group in grouped(layers, lambda name: _moment_bytes(layers[name]), memory_budget):
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


def _moment_bytes(layer: LinearLayer) -> int:
    """What the moments of a layer take, in float64."""
    inputs, outputs = _sizes(layer)
    return 8 * inputs * (inputs + outputs)


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
    for name, sums in moments.items():
        if not bool(sums.gram.isfinite().all() and sums.cross.isfinite().all()):
            raise BadInput(f"{name}: its inputs or outputs on {task.name} are not finite; use float32.")
    return moments


def _outputs(network: Any, modules: Mapping[str, nn.Module], batch: EncodedBatch) -> Outputs:
    """What each of the modules puts out."""
    outputs: dict[str, deque[Tensor]] = {name: deque() for name in modules}
    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = module.register_forward_hook(lambda _, __, output, name=name: outputs[name].append(output))
            hooks.callback(hook.remove)
        answer(network, batch.to(device_of(network)))
    return outputs


@contextmanager
def _forced(
    layers: Mapping[str, LinearLayer], outputs: Outputs, moments: Mapping[str, _Moments], batch: EncodedBatch
) -> Iterator[None]:
    """Inside, every layer puts out what the other network's did; what goes in is added to its moments."""

    def force(name: str, inputs: Tensor) -> Tensor:
        output = outputs[name].popleft()
        if name in moments:
            moments[name].add(batch.visible(inputs), batch.visible(output))
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
    tensors = {}
    if layer.module.bias is not None:
        fitted, tensors[bias] = fitted[:-1], fitted[-1].to(student[bias])
    tensors[weight] = (fitted.T if layer.axis == 1 else fitted).contiguous().to(student[weight])
    return tensors, fit


def stream_writers(architecture: Architecture) -> tuple[str, ...]:
    """The weights through which blocks write to the residual stream, in the order of the blocks."""
    return tuple(dict.fromkeys(output_weight(block) for block in architecture.blocks))


def block_tensors(architecture: Architecture) -> frozenset[str]:
    """What stays or starts as the base's: all that a change of basis inside a block can alter, and what is fitted."""
    inside = architecture.symmetry.select("query_key", "value_output", "heads", "feed_forward", "experts")
    biases = {output_bias(block) for block in architecture.blocks}
    return frozenset(architecture.symmetry.tensors_of(inside)) | biases


def fit_projection(gram: Tensor, moments: Tensor, start: Tensor, ridge: float) -> Tensor:
    """The projection that maps the inputs nearest to the outputs, pulled towards ``start``; in float64.

    Args:
        gram: X^T X / rows, float64 [inputs, inputs].
        moments: X^T Y / rows, float64 [inputs, outputs].
        start: W_0, float64 [inputs, outputs].
        ridge: mu relative to the mean of the diagonal of ``gram``.
    """
    mean = float(gram.diagonal().mean())
    if mean == 0:  # nothing ever goes in
        return start.clone()
    regular = gram.clone()
    regular.diagonal().add_(ridge * mean)
    # Only what departs from the start is solved for: it is what the ridge pulls at.
    fitted: Tensor = start + torch.linalg.solve(regular, moments - gram @ start)
    return fitted
