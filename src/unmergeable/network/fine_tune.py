"""Fine-tuning on examples that fit in memory, and how well a network does on others of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.errors import BadInput
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.precision import FULL, Precision
from unmergeable.network.tasks import Predict, Task, device_of
from unmergeable.network.train import Batch, Schedule, shuffled_batches, train
from unmergeable.network.training_state import Kept
from unmergeable.progress import Progress, silent

_MASK = "attention_mask"
_DECODER = "decoder_"
"""What names of a decoder's inputs begin with."""


def gather_examples(task: Task, count: int, *, pad: int = 0) -> EncodedBatch:
    """The first ``count`` examples of a task as one batch; shorter texts are padded on the right with ``pad``.

    Raises:
        BadInput: there are fewer, or their sizes differ and no mask could hide the padding.
    """
    taken: list[EncodedBatch] = []
    missing = count
    for batch in task.batches:
        taken.append(select(batch, torch.arange(min(missing, len(batch)))))
        missing -= len(taken[-1])
        if missing == 0:
            break
    if missing:
        raise BadInput(f"{task.name}: {count - missing} examples where {count} are asked for; give more of them.")
    inputs = {name: _joined(name, [batch.inputs for batch in taken], pad) for name in taken[0].inputs}
    labels = [batch.labels for batch in taken if batch.labels is not None]
    return EncodedBatch(inputs, torch.cat(labels) if labels else None)


def padding_token(network: Any) -> int:
    """What fills short texts: hidden by the mask, but some heads look for it."""
    return getattr(getattr(network, "config", None), "pad_token_id", None) or 0


def select(examples: EncodedBatch, numbers: Tensor) -> EncodedBatch:
    """The examples of these numbers, int64 [chosen]. Places that are padding in all of them are left out."""
    inputs = {name: tensor[numbers] for name, tensor in examples.inputs.items()}
    for side in ("", _DECODER):
        mask = inputs.get(side + _MASK)
        if mask is not None:
            is_seen = mask.bool().any(dim=0)
            inputs |= {
                name: tensor[:, is_seen]
                for name, tensor in inputs.items()
                if tensor.shape[:2] == mask.shape and name.startswith(_DECODER) == bool(side)
            }
    return EncodedBatch(inputs, None if examples.labels is None else examples.labels[numbers])


def fine_tune(
    network: nn.Module,
    predict: Predict,
    examples: EncodedBatch,
    schedule: Schedule,
    *,
    batch_size: int,
    is_trained: Callable[[str], bool] = lambda name: True,
    penalty: Callable[[], Tensor] | None = None,
    seed: int = 0,
    kept: Kept | None = None,
    precision: Precision = FULL,
    stage: str = "fine-tuning",
    progress: Progress = silent,
) -> list[float]:
    """Minimise the mean cross-entropy of the choices in place, and return its value at each step.

    Args:
        network: in any mode; it ends in evaluation mode.
        predict: how its output is read.
        examples: at least one; batches are drawn from them without replacement, in a new order each epoch.
        schedule: steps and rates.
        batch_size: or all examples, if there are fewer.
        is_trained: which parameters may change, by module name.
        penalty: a scalar of the weights, added to the loss.
        seed: of the order and of the network's own randomness.
        kept, precision: see :func:`unmergeable.network.train.train`.
        stage, progress: told of the steps under this name.

    Raises:
        BadInput: the examples have no labels, or the network does not take them.
        UnmergeableError: the loss is no longer finite.
    """

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        prediction = predict(network, encoded(examples, batch))
        entropy = functional.cross_entropy(prediction.logits.float(), prediction.require_targets())
        return entropy if penalty is None else entropy + penalty()

    return train(
        network,
        drawn_batches(examples, batch_size, seed),
        loss,
        schedule,
        is_trained=is_trained,
        seed=seed,
        kept=kept,
        precision=precision,
        stage=stage,
        progress=progress,
    )


def drawn_batches(examples: EncodedBatch, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches for :func:`~unmergeable.network.train.train`, without end: inputs and, where there are any, labels.

    Examples are drawn without replacement, in a new order each epoch; all of them at once, if they are fewer.
    """
    for numbers in shuffled_batches(len(examples), min(batch_size, len(examples)), seed):
        batch = select(examples, numbers)
        yield (*batch.inputs.values(), *(() if batch.labels is None else (batch.labels,)))


def encoded(examples: EncodedBatch, batch: Batch) -> EncodedBatch:
    """A batch that was drawn from ``examples``, under the names of its inputs."""
    names = tuple(examples.inputs)
    labels = batch[len(names)] if len(batch) > len(names) else None
    return EncodedBatch(dict(zip(names, batch, strict=False)), labels)


@dataclass(frozen=True)
class Judgement:
    """Sums over choices: how many there were, how many right, and their cross-entropy in nats."""

    choices: int
    right: int
    loss: float

    @property
    def accuracy(self) -> float:
        return self.right / self.choices

    @property
    def mean_loss(self) -> float:
        return self.loss / self.choices


@torch.no_grad()
def judge(network: Any, predict: Predict, examples: EncodedBatch, *, batch_size: int) -> Judgement:
    """How well a network does on examples. Raises BadInput when they have no labels."""
    choices, right, loss = 0, 0, 0.0
    for numbers in torch.arange(len(examples)).split(batch_size):
        prediction = predict(network, select(examples, numbers).to(device_of(network)))
        targets, logits = prediction.require_targets(), prediction.logits.float()
        choices += len(targets)
        right += int((logits.argmax(dim=-1) == targets).sum())
        loss += float(functional.cross_entropy(logits, targets, reduction="sum"))
    return Judgement(choices, right, loss)


def added(judgements: Iterable[Judgement]) -> Judgement:
    """Judgements of different examples as one."""
    each = list(judgements)
    return Judgement(sum(j.choices for j in each), sum(j.right for j in each), sum(j.loss for j in each))


def _joined(name: str, inputs: list[Any], pad: int) -> Tensor:
    tensors: list[Tensor] = [batch[name] for batch in inputs]
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    if any(_MASK not in batch or batch[name].shape != batch[_MASK].shape for batch in inputs):
        raise BadInput(f"{name}: examples of different sizes, and no {_MASK} to pad them by; give them in one size.")
    longest = max(tensor.shape[1] for tensor in tensors)
    filling = pad if name == "input_ids" else 0
    return torch.cat([functional.pad(tensor, (0, longest - tensor.shape[1]), value=filling) for tensor in tensors])
