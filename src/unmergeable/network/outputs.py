"""What a network puts out, whatever it is: rows of logits or features, and the hidden states on the way there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.fine_tune import select
from unmergeable.network.tasks import answer, device_of, refusing

LOGITS = "logits"

KINDS = (LOGITS, "image_embeds", "text_embeds", "last_hidden_state", "sample")
"""Names of outputs in transformers and diffusers, those that a task reads first."""


ANSWER_LENGTH = 16
"""Tokens of the answers that an encoder and a decoder are shown."""


@dataclass(frozen=True)
class Outputs:
    """What a network makes of a batch.

    Attributes:
        kind: one of ``KINDS``.
        rows: [rows, width], one for each example, or for each place that the mask shows.
        states: of the stream between blocks, first to last, each [places shown, width]; none where not asked for.
    """

    kind: str
    rows: Tensor
    states: tuple[Tensor, ...] = ()

    @property
    def is_logits(self) -> bool:
        return self.kind == LOGITS


def widths_of(network: Any, batch: EncodedBatch) -> dict[str, int]:
    """The kinds of output that a network gives for a batch, and their widths. Raises BadInput as :func:`outputs_of`."""
    output = answer(network, batch)
    found = {kind: getattr(output, kind, None) for kind in KINDS}
    return {kind: int(_rows(batch, values).shape[1]) for kind, values in found.items() if values is not None}


def outputs_of(network: Any, batch: EncodedBatch, kind: str, *, with_states: bool = False) -> Outputs:
    """Run a network on a batch.

    Args:
        network: of transformers or diffusers.
        batch: its inputs; an encoder and a decoder need ``decoder_input_ids`` too.
        kind: of output, one that :func:`widths_of` names.
        with_states: keep the hidden states, where the network gives any.

    Raises:
        BadInput: the network does not take these inputs.
    """
    output = answer(network, batch, **({"output_hidden_states": True} if with_states else {}))
    return Outputs(kind, _rows(batch, getattr(output, kind)), _states(batch, output) if with_states else ())


def _states(batch: EncodedBatch, output: Any) -> tuple[Tensor, ...]:
    """The hidden states; of an encoder and a decoder one after the other."""
    listed = (
        getattr(output, name, None) for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    )
    return tuple(_rows(batch, values, is_stream=True) for values_of_one in listed for values in values_of_one or ())


def _rows(batch: EncodedBatch, values: Tensor, *, is_stream: bool = False) -> Tensor:
    """Places that are padding are left out. ``sample`` has one row for each example."""
    if values.dim() > 3 and not is_stream:
        return values.flatten(1)
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = batch.inputs.get(name)
        if mask is not None and values.dim() == 3 and values.shape[:2] == mask.shape:
            return EncodedBatch({"attention_mask": mask}).visible(values)
    return values.reshape(-1, values.shape[-1])


@torch.no_grad()
def with_answers(teacher: Any, examples: EncodedBatch, *, batch_size: int = 32) -> EncodedBatch:
    """The examples with the beginnings of the teacher's most likely answers, as the decoder reads them."""
    from transformers import GenerationConfig

    config = teacher.config
    padding = config.pad_token_id or 0
    greedy = GenerationConfig(
        max_new_tokens=ANSWER_LENGTH,
        do_sample=False,
        eos_token_id=config.eos_token_id,
        pad_token_id=padding,
        decoder_start_token_id=config.decoder_start_token_id,
    )
    rows: list[Tensor] = []
    for numbers in torch.arange(len(examples)).split(batch_size):
        batch = select(examples, numbers).to(device_of(teacher))
        with refusing(teacher, "does not continue these inputs", "give texts it can read"):
            generated = teacher.generate(**batch.inputs, generation_config=greedy)[:, :-1].cpu()
        rows += functional.pad(generated, (0, ANSWER_LENGTH - generated.shape[1]), value=padding)
    ids = torch.stack(rows)
    is_shown = ids != padding
    is_shown[:, 0] = True  # the token that a decoder starts with may be the one that fills rows up
    answers = {"decoder_input_ids": ids, "decoder_attention_mask": is_shown.long()}
    return EncodedBatch({**examples.inputs, **answers})
