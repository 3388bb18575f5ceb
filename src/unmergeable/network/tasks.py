"""What a network is asked: examples, and how its output is read as a choice among classes.

A classifier chooses one class per example. A causal language model chooses a token at every place of a text but the
first, so an example has many choices; so does an encoder and decoder, of the tokens that its decoder reads
(``decoder_input_ids``). Either way the choices are rows of logits, and everything that only needs a likelihood, an
entropy or an accuracy works on all of them. Encoders that end in features bring a ``predict`` of their own,
which holds the head of the task.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unmergeable.errors import BadInput, first_line
from unmergeable.network.encoding import EncodedBatch


@dataclass(frozen=True)
class Prediction:
    """Choices of a batch: logits, [choices, classes], and the right ones, int64 [choices], where they are known."""

    logits: Tensor
    targets: Tensor | None

    def require_targets(self) -> Tensor:
        """The right choices. Raises BadInput when they are not known."""
        if self.targets is None:
            raise BadInput("the data have no labels; this use of them needs one for every example.")
        return self.targets


Predict = Callable[[Any, EncodedBatch], Prediction]
"""A network and a batch, to its choices."""


def predict(network: Any, batch: EncodedBatch) -> Prediction:
    """The choices of a transformers classifier or language model.

    Raises:
        BadInput: the network is neither, or lacks what its decoder reads; the message says what to do.
    """
    if is_encoder_decoder(network) and "decoder_input_ids" not in batch.inputs:
        raise BadInput(
            f"{type(network).__name__} reads with an encoder and writes with a decoder: give both, as input_ids and "
            "decoder_input_ids (the tokens to write, behind the one it starts with) in an npz file."
        )
    output = answer(network, batch)
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is not None and logits.dim() == 2:
        return Prediction(logits, batch.labels)
    if logits is not None and logits.dim() == 3 and (is_causal_language_model(network) or is_encoder_decoder(network)):
        return _next_tokens(logits, batch)
    raise BadInput(
        f"{type(network).__name__} is no classifier and no language model; give a checkpoint that is one, or "
        "from Python a predict function with the head of the task."
    )


def answer(network: Any, batch: EncodedBatch, **options: bool) -> Any:
    """The network's output; ``options`` say what else it is to put out, such as ``output_hidden_states``.

    Raises:
        BadInput: the network does not take these inputs: their names, their shapes, or tokens that it does not know.
    """
    inputs = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.inputs.items())
    with refusing(network, f"does not take the inputs {inputs}", "give data made for this network"):
        return network(**batch.inputs, **options)


@contextmanager
def refusing(network: Any, what: str, remedy: str) -> Iterator[None]:
    """Turn what a network raises for inputs that are not its own into BadInput; running out of memory is not meant."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise BadInput(f"{type(network).__name__} {what} ({first_line(error)}); {remedy}.") from error


def is_causal_language_model(network: Any) -> bool:
    """Whether transformers lists the network's class, or one it extends, among those that predict the next token."""
    return _is_listed(network, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


def is_encoder_decoder(network: Any) -> bool:
    """The same for language models that read with an encoder and write with a decoder."""
    return _is_listed(network, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES")


def _is_listed(network: Any, listing: str) -> bool:
    names = [base.__name__ for base in type(network).__mro__ if base.__module__.startswith("transformers.")]
    if not names:
        return False
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    return not set(getattr(auto, listing).values()).isdisjoint(names)


def _next_tokens(logits: Tensor, batch: EncodedBatch) -> Prediction:
    """Each token from those before it; what the mask hides is left out."""
    is_asked = asks_next_token(batch)
    return Prediction(logits[:, :-1][is_asked], _written(batch)[0][:, 1:][is_asked])


def asks_next_token(batch: EncodedBatch) -> Tensor:
    """Where a language model is asked for the next token, bool [examples, length - 1]: inside what is seen."""
    ids, mask = _written(batch)
    shown = torch.ones_like(ids).bool() if mask is None else mask.bool()
    return shown[:, :-1] & shown[:, 1:]


def _written(batch: EncodedBatch) -> tuple[Tensor, Tensor | None]:
    """The tokens that a language model predicts, those that its decoder reads where it has one; and their mask."""
    prefix = "decoder_" if "decoder_input_ids" in batch.inputs else ""
    return batch.inputs[f"{prefix}input_ids"], batch.inputs.get(f"{prefix}attention_mask")


@dataclass(frozen=True)
class Task:
    """``batches`` can be gone through again, and are the same each time."""

    name: str
    batches: Iterable[EncodedBatch]
    predict: Predict = predict


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy of the choices, in nats: logits [choices, classes] to a scalar."""
    log_probabilities = functional.log_softmax(logits, dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()


@torch.no_grad()
def accuracy(network: Any, task: Task) -> float:
    """The fraction of right choices, over all examples.

    Raises:
        BadInput: the data have no labels, or there are none.
    """
    right = total = 0
    device = device_of(network)
    for batch in task.batches:
        prediction = task.predict(network, batch.to(device))
        targets = prediction.require_targets()
        right += int((prediction.logits.argmax(dim=-1) == targets).sum())
        total += len(targets)
    if total == 0:
        raise BadInput(f"{task.name}: no examples to score; give some.")
    return right / total


def device_of(network: Any) -> torch.device:
    """Where the network's weights are."""
    device: torch.device = next(network.parameters()).device
    return device
