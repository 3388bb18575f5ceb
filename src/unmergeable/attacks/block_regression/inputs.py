"""Inputs that need no data: tokens from the whole vocabulary, or noise that is smooth like an image."""

from __future__ import annotations

from typing import Any

import torch

from unmergeable.errors import UsageError
from unmergeable.network.encoding import EncodedBatch
from unmergeable.network.tasks import Task, is_encoder_decoder

LENGTH = 32
"""Tokens of an example that is drawn."""

PATCHES = 6
"""Patches along the side of an image that is drawn, for networks that read images of any size."""

BATCH = 32


def drawn(network: Any, *, examples: int, seed: int) -> Task:
    """That many examples for a network that reads tokens or images.

    Raises:
        UsageError: it reads something else.
    """
    generator = torch.Generator().manual_seed(seed)
    config, kind = network.config, getattr(network, "main_input_name", "")
    sizes = [min(BATCH, examples - start) for start in range(0, examples, BATCH)]
    if kind == "input_ids":
        vocabulary, most = int(config.vocab_size), int(getattr(config, "max_position_embeddings", LENGTH + 2))
        length = max(2, min(LENGTH, most - 2))
        batches = [
            EncodedBatch({"input_ids": torch.randint(vocabulary, (size, length), generator=generator)})
            for size in sizes
        ]
        return Task("tokens drawn from the vocabulary", batches)
    if kind == "pixel_values":
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        if str(config.model_type).startswith("dinov2"):  # which reads images of any size
            side = min(side, PATCHES * config.patch_size)
        shapes = [(size, int(getattr(config, "num_channels", 3)), side, side) for size in sizes]
        return Task("noise images", [EncodedBatch({"pixel_values": _smooth(shape, generator)}) for shape in shapes])
    raise UsageError(f"{type(network).__name__} reads {kind or 'unknown inputs'}, which cannot be drawn: give --data.")


def _smooth(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Noise whose amplitude falls with frequency, of unit variance."""
    spectrum = torch.fft.rfft2(torch.randn(shape, generator=generator))
    rows, columns = torch.fft.fftfreq(shape[-2])[:, None], torch.fft.rfftfreq(shape[-1])[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / max(shape))
    image = torch.fft.irfft2(spectrum / frequency, s=shape[-2:])
    return image / image.std()


def complete(network: Any, task: Task) -> list[EncodedBatch]:
    """The batches of a task with all that the network asks for: a decoder is shown the tokens of its encoder."""
    batches = []
    for batch in task.batches:
        inputs = dict(batch.inputs)
        if is_encoder_decoder(network) and "decoder_input_ids" not in inputs and "input_ids" in inputs:
            start = getattr(network.config, "decoder_start_token_id", None) or 0
            shifted = torch.roll(inputs["input_ids"], 1, dims=1)
            shifted[:, 0] = start
            inputs["decoder_input_ids"] = shifted
        batches.append(EncodedBatch(inputs))
    return batches
