"""The diagonal of the Fisher information: how much each weight matters to what a network says of its data.

    F = mean over examples x of E_{y ~ p(y|x)} [(d log p(y|x) / d theta)^2]

after Matena & Raffel (arXiv 2111.09832). ``labels`` says where y comes from:

=============  =====================================================================================================
``expected``   the expectation itself, one backward pass per class, as the authors do; for classifiers of few classes
``sampled``    one y drawn from the network's own p(y|x): unbiased, one backward pass per example
``empirical``  the label of the data: the empirical Fisher, another quantity, which vanishes where the network is sure
=============  =====================================================================================================

A text has a y at every place, drawn given the true text before it; log p is their sum. Examples are taken one by one,
since the mean of squares is not the square of a mean; memory holds one more copy of the network and its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from unmergeable.errors import BadInput, UsageError
from unmergeable.network.disk_weights import to_disk_names
from unmergeable.network.tasks import Prediction, Task, device_of
from unmergeable.progress import Progress, silent
from unmergeable.randomness import Stream

FisherLabels = Literal["expected", "sampled", "empirical"]


def diagonal_fisher(
    network: Any, task: Task, *, labels: FisherLabels = "sampled", seed: int = 0, progress: Progress = silent
) -> dict[str, Tensor]:
    """The diagonal Fisher information of every weight, float32, by its name on disk.

    Args:
        network: live, in evaluation mode; its gradients are used and left empty.
        task: the examples, and how the output is read.
        labels: where the labels come from, as above.
        seed: of the labels drawn.
        progress: told of every example.

    Raises:
        UsageError: ``labels`` is none of these.
        BadInput: empirical labels are asked for and missing; no example; a gradient that is not finite.
    """
    if labels not in get_args(FisherLabels):
        raise UsageError(f"labels={labels}: must be one of {', '.join(get_args(FisherLabels))}.")
    parameters: dict[str, Tensor] = dict(network.state_dict(keep_vars=True))
    # Names that share a weight share its sum.
    sums = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in parameters.values() if p.is_floating_point()}
    learnt = {id(p): p for p in parameters.values() if p.requires_grad}
    device, count = device_of(network), 0
    for batch in task.batches:
        for example in batch.singles():
            prediction = task.predict(network, example.to(device))
            stream = Stream.from_seed(seed).child(f"fisher.{count}")
            for log_likelihood, weight in _log_likelihoods(prediction, labels, stream):
                network.zero_grad(set_to_none=True)
                log_likelihood.backward(retain_graph=labels == "expected")
                for key, parameter in learnt.items():
                    if parameter.grad is not None:
                        gradient = parameter.grad.float()
                        sums[key].addcmul_(gradient, gradient, value=weight)
            count += 1
            progress(f"Fisher information: {task.name}", count, 0, "examples")  # of how many is not known
    network.zero_grad(set_to_none=True)
    if count == 0:
        raise BadInput(f"{task.name}: no examples to take the Fisher information of; give some.")
    fisher = to_disk_names(network, {n: sums[id(p)].div(count) for n, p in parameters.items() if id(p) in sums})
    _require_finite(fisher, task)
    return fisher


def _log_likelihoods(prediction: Prediction, labels: FisherLabels, stream: Stream) -> Iterator[tuple[Tensor, float]]:
    """Log-likelihoods of one example, and the weight of each in the expectation."""
    log_probabilities = functional.log_softmax(prediction.logits.float(), dim=-1)
    if labels == "empirical":
        yield _chosen(log_probabilities, prediction.require_targets()), 1.0
    elif labels == "sampled":
        yield _chosen(log_probabilities, sample_classes(log_probabilities.detach(), stream)), 1.0
    else:
        if len(log_probabilities) > 1:
            raise UsageError("labels=expected needs one choice per example, a text has many; use labels=sampled.")
        for log_probability in log_probabilities[0]:
            yield log_probability, float(log_probability.detach().exp())


def sample_classes(log_probabilities: Tensor, stream: Stream) -> Tensor:
    """A class for each row, drawn with its probability: [choices, classes] to int64 [choices]."""
    cumulative = log_probabilities.double().exp().cumsum(dim=-1)
    drawn = torch.from_numpy(stream.uniform(len(cumulative), 1)).to(cumulative)
    # The last sum may fall short of 1 by rounding, and a number above it would draw a class that does not exist.
    return torch.searchsorted(cumulative, drawn * cumulative[:, -1:]).squeeze(-1)


def _chosen(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    return log_probabilities.gather(-1, classes.unsqueeze(-1)).sum()


def _require_finite(fisher: Mapping[str, Tensor], task: Task) -> None:
    for name, tensor in fisher.items():
        if not bool(tensor.isfinite().all()):
            raise BadInput(
                f"{name}: its Fisher information on {task.name} is not finite; use the network in float32, or look for "
                "examples that break it."
            )
