"""``images``: folders of image files. And what else holds an image, as red, green and blue."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from unmergeable.data.example import Example, Image
from unmergeable.data.records import Fields, make_example, reading
from unmergeable.errors import BadInput, UsageError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What is decoded; Pillow would start other programs for some of the others."""

MAX_PIXELS = 40_000_000
"""A header is believed up to here: compressed, a file of kilobytes can hold gigabytes of one colour."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")


class ImageFiles:
    """The images below a folder, in the order of their paths; a folder for each class holds its own at any depth.

    Raises:
        BadInput: no folder; or some images lie in folders and some beside them, so that not all have a label.
    """

    def __init__(self, path: Path, fields: Fields) -> None:
        if not path.is_dir():
            raise BadInput(f"{path} is not a folder; give the folder of the images.")
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        beside = [file for file in files if file.parent == path]
        if beside and len(beside) < len(files):
            raise BadInput(f"{beside[0]} lies beside folders of images; put it in the folder of its class.")
        self._folder, self._files = path, files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Example:
        file = self._files[number]
        classes = file.relative_to(self._folder).parts[:-1]
        return make_example(read_image(file), classes[0] if classes else None, str(file))


def read_image(path: Path) -> Image:
    """The pixels of a file.

    Raises:
        BadInput: there is no such file, or it is no image.
        UsageError: Pillow is not installed.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist; correct the path of the image.")
    return _decoded(path, str(path))


def image_of_bytes(data: bytes, origin: str) -> Image:
    """The pixels of a file that is held in memory. Raises what :func:`read_image` does."""
    return _decoded(io.BytesIO(data), origin)


def _decoded(file: Path | IO[bytes], origin: str) -> Image:
    try:
        import PIL.Image
    except ImportError:
        raise UsageError("Pillow is not installed; pip install pillow") from None
    with reading(origin, "not a readable image", "remove or repair it"), warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # our own limit is lower
        with PIL.Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadInput(
                    f"{origin}: an image of {image.width} x {image.height} pixels; give one of at most {MAX_PIXELS:,}."
                )
            return as_pixels(image)


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
