"""Recoveries that learn from data: live networks are shown the attacker's examples, and the result is what they learn.

Each method gets the open checkpoints and the data, and returns what is to be written with all that was found out. The
writing itself is that of every recovery.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmergeable.attacks import FewShot, GradErase, Inputs, LayerwiseRidge, Recovered
from unmergeable.attacks.grad_erase import estimate_disturbance
from unmergeable.attacks.task_vectors import common_tensors
from unmergeable.checkpoint.source import TensorSource
from unmergeable.data import DataSource
from unmergeable.errors import Mismatch, UsageError
from unmergeable.network.disk_weights import find_places
from unmergeable.network.encoding import EncodedData, Encoder
from unmergeable.network.few_shot import FewShotResult, few_shot
from unmergeable.network.grad_erase import grad_erase
from unmergeable.network.layerwise_ridge import layerwise_ridge
from unmergeable.network.load import load_network
from unmergeable.network.polynomial_network import load_polynomial_network
from unmergeable.network.tasks import Task
from unmergeable.ops.inspection import under_original_names
from unmergeable.polynomials.layout import SECTION
from unmergeable.progress import Progress
from unmergeable.tasks import LabelledData

BATCH = 32
"""Examples read at a time; training draws batches of its own from them."""


@dataclass(frozen=True)
class AttackersData:
    """Local examples.

    Attributes:
        path: of the examples (see ``unmergeable.data``).
        encoder: the folder whose tokenizer or image processor prepares them.
        head: file of the task's head; None for a network that answers by itself.
    """

    path: Path
    encoder: Path
    head: Path | None

    def unlabelled(self, *, examples: int, seed: int) -> Task:
        """At most as many examples, drawn by ``seed``, for their inputs alone."""
        source = DataSource(self.path, seed=seed, limit=examples)
        return Task(str(self.path), EncodedData(source, Encoder(self.encoder), BATCH))

    def labelled(self, network: Any, *, samples: int, seed: int) -> Task:
        """As many labelled examples, drawn by ``seed``; texts alone for a causal language model without a head."""
        source = DataSource(self.path, seed=seed, limit=samples)
        return LabelledData(source, self.encoder, self.head).task(network, str(self.path), batch_size=BATCH)


@dataclass(frozen=True)
class Learnt:
    """What to write, and ``facts`` found out on the way, ready for JSON. They tell one run from another."""

    recovered: Recovered
    facts: Mapping[str, Any]


def _few_shot(method: FewShot, inputs: Inputs, data: AttackersData, progress: Progress) -> Learnt:
    if len(inputs.sources) > 1:
        raise UsageError("few_shot: give one --source, the model without the victim, or none for the base.")
    network = _load(inputs.protected)
    task = data.labelled(network, samples=method.samples, seed=method.seed)
    attack = few_shot(network, _state(inputs.protected, network), task, method, progress=progress)
    other = inputs.sources[0] if inputs.sources else inputs.base
    if _is_polynomial(other) == _is_polynomial(inputs.protected):
        start = _state_without_victim(other, inputs, network)
    else:  # the victim's structure is its own
        network = _load(other)
        start = _state(other, network)
    control = few_shot(network, start, task, method, progress=progress)
    return _compared(inputs.protected, attack, other, control, data)


def _layerwise_ridge(method: LayerwiseRidge, inputs: Inputs, data: AttackersData, progress: Progress) -> Learnt:
    if data.head is not None:
        raise UsageError("layerwise_ridge looks at the residual stream alone, and reads no head; leave out --head.")
    task = data.unlabelled(examples=method.examples, seed=method.seed)
    if _is_polynomial(inputs.protected):
        template, network, teacher = inputs.base, load_network(inputs.base.folder), _load(inputs.protected)
        protected = _state(under_original_names(inputs.protected), network)
    else:
        template, network, teacher = inputs.protected, load_network(inputs.protected.folder), None
        protected = _state(inputs.protected, network)
    base = _state(inputs.base, network)
    found = layerwise_ridge(
        network, protected, base, inputs.architecture, task, method, teacher=teacher, progress=progress
    )
    facts = {"data": str(data.path), "fits": [asdict(fit) for fit in found.fits], "skipped": list(found.skipped)}
    return Learnt(_written(template, found.weights), facts)


def _grad_erase(method: GradErase, inputs: Inputs, data: AttackersData, progress: Progress) -> Learnt:
    if len(inputs.sources) != 1:
        raise UsageError(
            "grad_erase: PROTECTED is the merged model; give the protected release it contains as --source."
        )
    (release,) = inputs.sources
    network = _load(inputs.protected)
    start = _state(inputs.protected, network)
    task = data.labelled(network, samples=method.samples, seed=method.seed)
    disturbances = {
        name: estimate_disturbance(release.tensor(name), inputs.base.tensor(name), method.disturbance)
        for name in common_tensors([inputs.protected, release, inputs.base])
        if name in start
    }
    attack = grad_erase(network, start, disturbances, task, method, progress=progress)
    start = _state_without_victim(inputs.base, inputs, network)
    control = grad_erase(network, start, disturbances, task, method, progress=progress)
    return _compared(inputs.protected, attack, inputs.base, control, data)


DATA_DRIVEN: Mapping[str, Callable[[Any, Inputs, AttackersData, Progress], Learnt]] = {
    FewShot.name: _few_shot,
    LayerwiseRidge.name: _layerwise_ridge,
    GradErase.name: _grad_erase,
}
"""The recoveries that need data, and how each is carried out."""


def _compared(
    protected: TensorSource, attack: FewShotResult, other: TensorSource, control: FewShotResult, data: AttackersData
) -> Learnt:
    """What training made of the victim, and beside it what the same made of a start without it."""
    facts = {
        "data": str(data.path),
        "with_victim": _run_facts(protected, attack),
        "without_victim": _run_facts(other, control),
    }
    return Learnt(_written(protected, attack.weights), facts)


def _run_facts(start: TensorSource, result: FewShotResult) -> dict[str, Any]:
    """Ready for JSON, which has no NaN."""
    return {
        "start": str(start.folder),
        "learning_rate": result.learning_rate,
        "losses": list(result.losses),
        "sweep": [
            {name: None if math.isnan(value) else value for name, value in asdict(trial).items()}
            for trial in result.trials
        ],
    }


def _written(template: TensorSource, weights: Mapping[str, Tensor]) -> Recovered:
    """The weights in a file like another; a second name of the same weight may be missing there."""
    return Recovered(template, {name: partial(_replaced, weights[name]) for name in template.names if name in weights})


def _replaced(tensor: Tensor, stored: Tensor) -> Tensor:
    return tensor.to(stored.dtype)


def _is_polynomial(source: TensorSource) -> bool:
    return SECTION in source.config


def _load(source: TensorSource) -> Any:
    return load_polynomial_network(source.folder) if _is_polynomial(source) else load_network(source.folder)


def _state(source: TensorSource, network: Any) -> dict[str, Tensor]:
    """The tensors that the network has, in these shapes; loading passes over the rest."""
    shapes = {name: tuple(place.shape) for name, place in find_places(network).items()}
    return {name: source.tensor(name) for name in source.names if shapes.get(name) == source.spec(name).shape}


def _state_without_victim(source: TensorSource, inputs: Inputs, network: Any) -> dict[str, Tensor]:
    """A model's tensors for the victim's network. An output head that it lacks starts from zero.

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
