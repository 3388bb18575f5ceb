"""How likely a language model finds continuations of a prompt: sum over their tokens of log p(token | all before it).

Each prompt is computed once. For a causal model its keys and values are kept and every continuation attends to them;
prompts of a batch are padded on the left, continuations on the right, and neither changes a number beyond rounding. For
an encoder and decoder the encoder runs once.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unmergeable.network.encoding import grouped
from unmergeable.network.tasks import device_of, refusing
from unmergeable.tasks.prompts import Question, padded, reads_with_encoder
from unmergeable.tasks.task_kind import Scores


@torch.no_grad()
def continuation_log_probabilities(network: Any, questions: Sequence[Question], *, batch_size: int) -> list[Scores]:
    """For each question the log probabilities of its continuations in nats, float64 [continuations].

    Args:
        network: a causal language model, or an encoder and decoder, of transformers.
        questions: what is asked.
        batch_size: the most continuations at a time (those of one question are never parted).

    Raises:
        BadInput: the network is no language model, or does not take prompts of this length or these tokens.
    """
    found: list[Scores | None] = [None] * len(questions)
    order = sorted(range(len(questions)), key=lambda number: len(questions[number].prefix))
    score = _encoder_decoder if reads_with_encoder(network) else _causal
    for chosen in grouped(order, lambda number: len(questions[number].continuations), batch_size):
        batch = [questions[number] for number in chosen]
        longest = max(len(question.prefix) for question in batch)
        remedy = "give a language model, and set max_length to what it can read"
        with refusing(network, f"does not continue prompts of {longest} tokens", remedy):
            totals = score(network, batch, device_of(network))
        parts = np.split(totals, np.cumsum([len(question.continuations) for question in batch])[:-1])
        for number, part in zip(chosen, parts, strict=True):
            found[number] = part
    return [scores for scores in found if scores is not None]


def reference_losses(network: Any, questions: Sequence[Question], *, batch_size: int) -> Scores:
    """The mean of -log p over the tokens of the only continuation of each question, float64 [questions]."""
    found = continuation_log_probabilities(network, questions, batch_size=batch_size)
    return np.array(
        [-scores[0] / len(question.continuations[0]) for scores, question in zip(found, questions, strict=True)]
    )


def _causal(network: Any, questions: Sequence[Question], device: torch.device) -> Scores:
    owners, continuations, lengths = _continuations(questions, device)
    ids, mask = padded([question.prefix for question in questions], device, side="left")
    accepted = inspect.signature(network.forward).parameters
    places = {"position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0)} if "position_ids" in accepted else {}
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    begun = network(input_ids=ids, attention_mask=mask, use_cache=True, **places, **only_last)
    first = begun.logits[:, -1:][owners]
    width = continuations.shape[1]
    if width == 1:
        return _totals(first, continuations, lengths)
    keys_and_values = cache_name(network)
    seen_before = getattr(begun, keys_and_values)
    seen_before.batch_select_indices(owners)
    seen = torch.cat([mask[owners], torch.ones_like(continuations[:, :-1])], dim=1)
    if places:
        places = {"position_ids": (seen.cumsum(dim=-1) - 1)[:, -(width - 1) :]}
    rest = network(
        input_ids=continuations[:, :-1], attention_mask=seen, use_cache=True, **{keys_and_values: seen_before}, **places
    )
    return _totals(torch.cat([first, rest.logits], dim=1), continuations, lengths)


def _encoder_decoder(network: Any, questions: Sequence[Question], device: torch.device) -> Scores:
    owners, continuations, lengths = _continuations(questions, device)
    ids, mask = padded([question.prefix for question in questions], device, side="right")
    states = network.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    start = torch.full_like(continuations[:, :1], network.config.decoder_start_token_id)
    output = network(
        encoder_outputs=(states[owners],),
        attention_mask=mask[owners],
        decoder_input_ids=torch.cat([start, continuations[:, :-1]], dim=1),
    )
    return _totals(output.logits, continuations, lengths)


def cache_name(network: Any) -> str:
    """What a causal language model calls the keys and values it has computed: before transformers 5.24 otherwise."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


def _continuations(questions: Sequence[Question], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All continuations of a batch: whose they are [rows], their tokens [rows, width] padded on the right, lengths."""
    counts = torch.tensor([len(question.continuations) for question in questions], device=device)
    rows = [torch.tensor(tokens, device=device) for question in questions for tokens in question.continuations]
    owners = torch.repeat_interleave(torch.arange(len(questions), device=device), counts)
    return owners, pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows], device=device)


def _totals(logits: Tensor, tokens: Tensor, lengths: Tensor) -> Scores:
    """Logits [rows, width, vocabulary] that predict tokens [rows, width], summed over the length of each row."""
    chosen = logits.double().log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    is_there = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
    totals: Scores = chosen.where(is_there, 0.0).sum(dim=1).cpu().numpy()
    return totals
