"""Inputs for a small network: random tokens, pixels or sound, whatever its ``forward`` reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from unmergeable.derivation.images import Reader
from unmergeable.errors import UsageError

LENGTH = 12
DECODED = 7
"""Tokens that a decoder reads behind an encoder."""

Inputs = dict[str, Any]

_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size", "input_dim")
_PARTS_OF_SOUND = ("encoder_config", "audio_config", "speech_encoder_config", "encoder")


def proposals(network: Any, config: Any) -> Iterator[Inputs]:
    """Arguments for the network's ``forward``, what is most likely to fit first.

    Raises:
        UsageError: the network reads something of which nothing is known here.
    """
    maker = _Maker(network, config)
    usual = "input_ids" if hasattr(network, "main_input_name") else "latents"
    main = str(getattr(network, "main_input_name", usual))
    if main not in _MAKERS:
        raise UsageError(f"{type(network).__name__} reads {main}, which no random inputs are made for.")
    for inputs in _MAKERS[main](maker):
        if (
            main != "latents"
            and "decoder_input_ids" in maker.accepted
            and bool(getattr(config, "is_encoder_decoder", False))
        ):
            inputs["decoder_input_ids"] = maker.decoded()
        if "use_cache" in maker.accepted:
            inputs["use_cache"] = False
        yield inputs


class _Maker:
    def __init__(self, network: Any, config: Any) -> None:
        self.accepted = inspect.signature(network.forward).parameters
        self.network, self.config = network, config
        self.generator = torch.Generator().manual_seed(1)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.vocabulary = int(getattr(text, "vocab_size", 100) or 100)

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def tokens(self, *shape: int) -> Tensor:
        return torch.randint(min(60, self.vocabulary // 2), self.vocabulary, shape, generator=self.generator)

    def decoded(self) -> Tensor:
        channels = getattr(getattr(self.config, "decoder_config", None), "num_channels", None)
        return self.tokens(1, DECODED, channels) if channels else self.tokens(1, DECODED)

    def text(self) -> Iterator[Inputs]:
        """Tokens with an image, which runs the network's tower; tokens alone; then with what else is read."""
        if "input_ids" not in self.accepted:
            raise UsageError("the network reads neither tokens nor anything else that is known.")
        yield from Reader(self.network, self.config, self.accepted, self.numbers, self.tokens).inputs(LENGTH)
        if "bbox" in self.accepted:
            yield {"input_ids": self.tokens(1, LENGTH), "bbox": torch.rand(1, LENGTH, 4, generator=self.generator)}
        yield {"input_ids": self.tokens(1, LENGTH)}
        books = getattr(self.config, "num_codebooks", None)
        if isinstance(books, int):  # sound as tokens, of several codebooks at each step
            yield {"input_ids": self.tokens(books, LENGTH)}
            yield {"input_ids": self.tokens(1, LENGTH, books + 1)}
        if "pixel_values" in self.accepted:
            yield from self.pixels()
        if "input_features" in self.accepted:
            yield from ({"input_ids": self.tokens(1, LENGTH), **sound} for sound in self.features())

    def pixels(self) -> Iterator[Inputs]:
        vision = getattr(self.config, "vision_config", None) or getattr(self.config, "encoder", None) or self.config
        channels = int(getattr(vision, "num_channels", 3))
        if "spatial_shapes" in self.accepted:  # patches of any number of rows and columns
            width = channels * int(getattr(vision, "patch_size", 8)) ** 2
            mask, shape = torch.ones(1, 16, dtype=torch.long), torch.tensor([[4, 4]])
            yield {"pixel_values": self.numbers(1, 16, width), "pixel_attention_mask": mask, "spatial_shapes": shape}
        size = getattr(vision, "image_size", None) or 32
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        image = {"pixel_values": self.numbers(1, channels, height, width)}
        if "qformer_input_ids" in self.accepted:
            image["qformer_input_ids"] = self.tokens(1, LENGTH)
        if "input_ids" not in self.accepted or getattr(self.config, "is_encoder_decoder", False):
            yield image
            return
        if "image_attention_mask" in self.accepted:
            yield {
                "pixel_values": image["pixel_values"][None],
                "input_ids": self.tokens(1, LENGTH),
                "image_attention_mask": torch.ones(1, LENGTH, 1, dtype=torch.long),
            }
        if "image_embeds_position_mask" in self.accepted:
            mask = (torch.arange(LENGTH) < int(getattr(self.config, "latent_query_num", 4)))[None]
            yield {**image, "input_ids": self.tokens(1, LENGTH), "image_embeds_position_mask": mask}
        yield {**image, "input_ids": self.tokens(1, LENGTH)}
        yield {"input_ids": self.tokens(1, LENGTH)}
        for count in self._image_tokens(vision, height):
            yield {**image, "input_ids": self._with_image(count)}

    def _image_tokens(self, vision: Any, height: int) -> Iterator[int]:
        """How many tokens may stand for an image."""
        for name in ("num_query_tokens", "mm_tokens_per_image", "image_seq_length", "num_image_tokens"):
            if isinstance(count := getattr(self.config, name, None), int):
                yield count
        patch = getattr(vision, "patch_size", None)
        if isinstance(patch, int):
            yield (height // patch) ** 2

    def _with_image(self, count: int) -> Tensor:
        names = ("image_token_id", "image_token_index")
        place = next((value for name in names if isinstance(value := getattr(self.config, name, None), int)), 3)
        return torch.cat([torch.full((1, count), place), self.tokens(1, LENGTH)], dim=1)

    def features(self) -> Iterator[Inputs]:
        parts = [self.config, *(getattr(self.config, name, None) for name in _PARTS_OF_SOUND)]
        found = ((part, getattr(part, name, None)) for name in _BINS for part in parts)
        part, bins = next(((part, int(value)) for part, value in found if isinstance(value, int)), (self.config, 16))
        frames = 2 * int(getattr(part, "max_source_positions", 32))
        shapes = [(1, bins, frames), (1, frames, bins)]
        upright = hasattr(part, "num_mel_bins") and hasattr(part, "max_source_positions")
        for shape in shapes if upright else shapes[::-1]:
            yield {"input_features": self.numbers(*shape)}

    def wave(self) -> Iterator[Inputs]:
        yield {"input_values": self.numbers(1, 4000)}
        yield from ({"input_values": sound["input_features"]} for sound in self.features())

    def either(self) -> Iterator[Inputs]:
        if "pixel_values" in self.accepted:
            yield from self.pixels()
        yield {"input_values": self.numbers(1, 4000)}
        yield from self.features()

    def patches(self) -> Iterator[Inputs]:
        vision = getattr(self.config, "vision_config", self.config)
        places = torch.stack([torch.arange(16) // 4 + 1, torch.arange(16) % 4 + 1], dim=1).double()
        found = self.numbers(16, int(getattr(vision, "patch_embed_hidden_size", 768)))
        yield {"flattened_patches": torch.cat([places, found], dim=1)[None]}

    def latents(self) -> Iterator[Inputs]:
        """What a network that takes away noise reads: latents, a time, and texts in the width it expects."""
        config = self.config
        widths = (int(config[name]) for name in _TEXT_WIDTHS if config.get(name))
        beside: Inputs = {"timestep": torch.tensor([7]), "return_dict": True}
        if "encoder_hidden_states" in self.accepted:
            count = int(config.get("max_text_seq_length") or 6)
            beside["encoder_hidden_states"] = self.numbers(1, count, next(widths, 8))
        if "encoder_attention_mask" in self.accepted:
            beside["encoder_attention_mask"] = torch.ones(1, 6, dtype=torch.int64)
        if "pooled_projections" in self.accepted:
            beside["pooled_projections"] = self.numbers(1, int(config["pooled_projection_dim"]))
        if "guidance" in self.accepted and config.get("guidance_embeds"):
            beside["guidance"] = torch.tensor([3.5])
        if "class_labels" in self.accepted:
            beside["class_labels"] = torch.tensor([1])
        channels, side = int(config["in_channels"]), 4
        if "img_ids" in self.accepted:
            places = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side)).double()
            beside |= {"img_ids": places, "txt_ids": torch.zeros(6, 3)}
        if "img_shapes" in self.accepted:
            beside["img_shapes"] = [(1, side, side)]
        if "num_frames" in self.accepted:
            beside |= {"num_frames": 1, "height": side, "width": side}
        frames = 3 if "sample_frames" in config else 1
        for shape in (
            (1, channels, 8, 8),
            (1, side * side, channels),
            (1, channels, 2, 8, 8),
            (1, frames, channels, 8, 8),
        ):
            yield {**beside, "hidden_states" if "hidden_states" in self.accepted else "sample": self.numbers(*shape)}


_TEXT_WIDTHS = (
    "joint_attention_dim", "caption_channels", "text_dim", "text_embed_dim", "cap_feat_dim", "cross_attention_dim",
)  # fmt: skip

_MAKERS = {
    "latents": _Maker.latents,
    "input_ids": _Maker.text,
    "pixel_values": _Maker.pixels,
    "input_features": _Maker.features,
    "input_values": _Maker.wave,
    "inputs": _Maker.either,
    "flattened_patches": _Maker.patches,
}
