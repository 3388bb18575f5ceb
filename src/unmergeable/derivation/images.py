"""Images for a small network that reads text as well, and text with as many placeholders as its tower makes of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unmergeable.derivation.double import in_float64

Inputs = dict[str, Any]

SIDE = 4
"""An image of this many by this many patches."""

_PLACEHOLDERS = ("image_token_id", "image_token_index", "im_patch_id", "image_patch_id")
_CHANNELS = ("num_channels", "in_channels", "in_chans")


class Numbers(Protocol):
    def __call__(self, *shape: int) -> Tensor: ...


@dataclass(frozen=True)
class Reader:
    """A network that reads images with text: its config, the arguments of its ``forward``, and random inputs for it."""

    network: Any
    config: Any
    accepted: Mapping[str, Any]
    numbers: Numbers
    tokens: Numbers

    def inputs(self, length: int) -> Iterator[Inputs]:
        """Arguments with an image and ``length`` tokens of text behind it, what is most likely to fit first."""
        if "pixel_values" not in self.accepted:
            return
        for image in self._images():
            yield {**image, **self._text(self._placeholders(image), length)}

    def _text(self, count: int, length: int) -> Inputs:
        """``count`` placeholders and ``length`` other tokens, and what tells them apart."""
        tokens = self.tokens(1, length)
        place = next((value for name in _PLACEHOLDERS if isinstance(value := getattr(self.config, name, None), int)), 3)
        begin = getattr(self.config, "vision_start_token_id", None)
        first = tokens[:, :1] if begin is None else torch.full((1, 1), begin)
        ids = torch.cat([first, torch.full((1, count), place), tokens[:, 1:]], dim=1)
        kinds = ("mm_token_type_ids", "token_type_ids")
        told = {name: (ids == place).long() for name in kinds if name in self.accepted}
        if "cross_attention_mask" in self.accepted:
            told["cross_attention_mask"] = torch.ones(1, ids.shape[1], 1, self._tiles(), dtype=torch.long)
        return {"input_ids": ids, **told}

    def _images(self) -> Iterator[Inputs]:
        """Random pixels in every form in which networks read them, of those that the arguments speak for."""
        vision = _vision(self.config)
        channels = next((int(value) for name in _CHANNELS if (value := getattr(vision, name, None))), 3)
        patch = _first(getattr(vision, "patch_size", None)) or 8
        frames = int(getattr(vision, "temporal_patch_size", None) or 1)
        size = getattr(vision, "image_size", None) or SIDE * patch
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        square = self.numbers(1, channels, height, width)
        if "image_grid_thw" in self.accepted or "image_grid_hw" in self.accepted:
            grids = {"image_grid_thw": [[1, SIDE, SIDE]], "image_grid_hw": [[SIDE, SIDE]], "image_merge_sizes": [2]}
            beside = {name: torch.tensor(grid) for name, grid in grids.items() if name in self.accepted}
            for shape in ((channels * frames * patch**2,), (channels, patch, patch)):
                yield {"pixel_values": self.numbers(SIDE * SIDE, *shape), **beside}
            return
        if "spatial_shapes" in self.accepted:
            yield {
                "pixel_values": self.numbers(1, SIDE * SIDE, channels * patch**2),
                "spatial_shapes": torch.tensor([[SIDE, SIDE]]),
                "pixel_attention_mask": torch.ones(1, SIDE * SIDE, dtype=torch.long),
            }
            return
        if "image_position_ids" in self.accepted:
            places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).flip(-1)[None]
            yield {"pixel_values": self.numbers(1, SIDE * SIDE, channels * patch**2), "image_position_ids": places}
            return
        if "aspect_ratio_ids" in self.accepted:
            tiles = self._tiles()
            yield {
                "pixel_values": self.numbers(1, 1, tiles, channels, height, width),
                "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
                "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long),
            }
            return
        if "image_sizes" in self.accepted:
            sizes = {"image_sizes": torch.tensor([[height, width]])}
            if getattr(self.config, "image_grid_pinpoints", None):  # the whole image, and two tiles of it
                yield {"pixel_values": self.numbers(1, 3, channels, height, width), **sizes}
            yield {"pixel_values": square, **sizes}
        yield {"pixel_values": square}
        yield {"pixel_values": square[None]}

    def _tiles(self) -> int:
        return int(getattr(_vision(self.config), "max_num_tiles", 1))

    def _placeholders(self, image: Inputs) -> int:
        """How many tokens stand for ``image``: as many as the network itself makes vectors of it."""
        holders = (self.network, getattr(self.network, "base_model", None))
        ask = next((found for holder in holders if (found := getattr(holder, "get_image_features", None))), None)
        if ask is None:
            return 0
        wanted = inspect.signature(ask).parameters
        try:
            with in_float64(), torch.no_grad():
                found = ask(**(image if "args" in wanted else {k: v for k, v in image.items() if k in wanted}))
        except Exception:
            return 1  # running the network says what is wrong
        pooled = getattr(found, "pooler_output", None)
        rows = _tensors(getattr(found, "last_hidden_state", found) if pooled is None else pooled)
        return sum(math.prod(some.shape[:-1]) for some in rows)


def _vision(config: Any) -> Any:
    """The settings of what reads images."""
    for name in ("vision_config", "vision_encoder_config", "image_config", "encoder"):
        found = getattr(config, name, None)
        if found is not None:
            return found
    return config


def _first(value: Any) -> int | None:
    """A number, or the first of several."""
    return int(value[0]) if isinstance(value, (list, tuple)) else value


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for one in found:
            yield from _tensors(one)
