"""Image files, and what else holds an image, as red, green and blue."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from unmergeable.data.example import Image
from unmergeable.errors import BadInput, UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")


def read_image(path: Path) -> Image:
    """The pixels of a file.

    Raises:
        BadInput: there is no such file, or it is no image.
        UsageError: Pillow is not installed.
    """
    return _decoded(path, str(path))


def image_of_bytes(data: bytes, origin: str) -> Image:
    """The pixels of a file that is held in memory. Raises what :func:`read_image` does."""
    return _decoded(io.BytesIO(data), origin)


def _decoded(file: Path | IO[bytes], origin: str) -> Image:
    try:
        import PIL.Image
    except ImportError:
        raise UsageError("Pillow is not installed; pip install pillow") from None
    try:
        with PIL.Image.open(file) as image:
            return as_pixels(image)
    except FileNotFoundError:
        raise BadInput(f"{origin} does not exist; correct the path of the image.") from None
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadInput(f"{origin}: not a readable image ({reason}); remove or repair it.") from None


def as_pixels(image: Any) -> Image:
    """The pixels of a PIL image, [height, width, 3]."""
    return np.asarray(image.convert("RGB"))


def array_pixels(array: npt.NDArray[Any], origin: str) -> Image:
    """The pixels of an array, [height, width] (grey) or [height, width, 3].

    Raises:
        BadInput: the array has another shape, or other numbers than bytes.
    """
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise BadInput(
            f"{origin}: an image of {array.dtype} {list(array.shape)}; it must be uint8 [height, width] or "
            "[height, width, 3]."
        )
    return np.stack([array] * 3, axis=-1) if array.ndim == 2 else array
