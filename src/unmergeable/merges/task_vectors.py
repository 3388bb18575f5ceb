"""Merges in memory by the thousand: task vectors computed once, added up into a network without touching a file.

    weights = base + sum_i coefficients_i * task_vector_i

Task arithmetic with many coefficients is what audits, sweeps and AdaMerging do. The sum is taken in the order, and
rounded as, ``merge_state_dicts`` and the streaming engine do it: for float32 models the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from unmergeable.errors import UsageError
from unmergeable.merges.base import Inputs
from unmergeable.merges.blocks import Operand, accumulation_dtype, tensor_operand, weighted_sum
from unmergeable.merges.election import keep_elected
from unmergeable.merges.models import mergeable_names, state_dict_model
from unmergeable.merges.ties import global_thresholds
from unmergeable.network.disk_weights import find_places, show, swapped

Score = TypeVar("Score")

CoefficientsOf = Callable[[str], Sequence[float]]
"""The coefficient of every expert in a tensor, by its name."""


@dataclass(frozen=True)
class TaskVectors:
    """A base and what its experts have learnt, by the names on disk, in the dtype merges compute in.

    ``base`` holds every tensor of the models, ``vectors`` (one for each expert) the floating-point ones.
    """

    base: Mapping[str, Tensor]
    vectors: tuple[Mapping[str, Tensor], ...]

    @classmethod
    def between(cls, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> TaskVectors:
        """The task vectors of state dicts.

        Raises:
            Mismatch: naming the first tensor that is not in every model with one shape.
        """
        names = _shared_names(base, experts)
        wide = {
            name: tensor.detach().to(accumulation_dtype(tensor.dtype)) for name, tensor in base.items() if name in names
        }
        vectors = tuple(
            {name: expert[name].detach().to(wide[name].dtype) - wide[name] for name in wide} for expert in experts
        )
        return cls({name: wide.get(name, tensor) for name, tensor in base.items()}, vectors)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that are merged."""
        return tuple(self.vectors[0])

    def elected(self, density: float) -> TaskVectors:
        """The same, each trimmed to ``density`` and left with the signs that TIES elects (AdaMerging++)."""

        def operands(name: str) -> tuple[Operand, ...]:
            # Next to a base of zeros a task vector is an expert, bit for bit.
            states = [torch.zeros_like(self.base[name]), *(vector[name] for vector in self.vectors)]
            return tuple(tensor_operand("task vector", state) for state in states)

        thresholds = global_thresholds(Inputs(self.names, operands), (density,) * len(self.vectors))
        vectors: tuple[dict[str, Tensor], ...] = tuple({} for _ in self.vectors)
        for name in self.names:
            kept = [vector[name].clone() for vector in self.vectors]
            keep_elected(kept, torch.empty_like(kept[0]), thresholds)
            for vector, elected in zip(vectors, kept, strict=True):
                vector[name] = elected
        return TaskVectors(self.base, vectors)

    def merged(
        self, coefficients: Sequence[float] | CoefficientsOf, *, into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The merged weights.

        Args:
            coefficients: one per expert, or a function that gives them for a tensor.
            into: tensors to overwrite with the result instead of new ones.

        Raises:
            UsageError: another number of coefficients than of experts.
        """
        result = {}
        for name, base in self.base.items():
            out = None if into is None else into[name]
            if name not in self.vectors[0]:
                result[name] = base if out is None else out.copy_(base)
                continue
            weights = coefficients(name) if callable(coefficients) else coefficients
            if len(weights) != len(self.vectors):
                raise UsageError(f"{name}: {len(weights)} coefficients for {len(self.vectors)} experts: give one each.")
            first, *others = [vector[name] for vector in self.vectors]
            total = weighted_sum([first.clone() if out is None else out.copy_(first), *others], weights)
            result[name] = total.add_(base)
        return result


def score_merges(
    network: Any, task_vectors: TaskVectors, coefficients: Sequence[Sequence[float]], score: Callable[[Any], Score]
) -> list[Score]:
    """What ``score`` says of the network with the merged weights of each set of coefficients.

    The weights lie in one buffer that is overwritten from set to set and that the network computes with; afterwards
    it has its own again.

    Raises:
        UsageError: a set of another length than the number of experts.
        Mismatch: the weights do not belong to this network.
    """
    if not coefficients:
        return []
    buffer = task_vectors.merged(coefficients[0])
    scores = []
    with swapped(network, buffer):
        places = find_places(network)
        for point in coefficients:
            show(places, task_vectors.merged(point, into=buffer))
            scores.append(score(network))
    return scores


def _shared_names(base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> set[str]:
    models = [state_dict_model("base", base)]
    models += [state_dict_model(f"expert {number}", expert) for number, expert in enumerate(experts, start=1)]
    return set(mergeable_names(models))
