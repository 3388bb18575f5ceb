"""``images``: a folder of image files, or a folder for each class that holds its images at any depth."""

from __future__ import annotations

from pathlib import Path

from unmergeable.data.example import Example
from unmergeable.data.images import SUFFIXES, read_image
from unmergeable.data.records import Fields, Records, make_example
from unmergeable.errors import BadInput


def open_records(path: Path, fields: Fields) -> Records:
    """The images below a folder, in the order of their paths.

    Raises:
        BadInput: no folder; or some images lie in folders and some beside them, so that not all have a label.
    """
    if not path.is_dir():
        raise BadInput(f"{path} is not a folder; give the folder of the images.")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    beside = [file for file in files if file.parent == path]
    if beside and len(beside) < len(files):
        raise BadInput(f"{beside[0]} lies beside folders of images; put it in the folder of its class.")
    return _ImageFiles(path, files)


class _ImageFiles:
    def __init__(self, folder: Path, files: list[Path]) -> None:
        self._folder, self._files = folder, files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Example:
        file = self._files[number]
        classes = file.relative_to(self._folder).parts[:-1]
        return make_example(read_image(file), classes[0] if classes else None, str(file))
