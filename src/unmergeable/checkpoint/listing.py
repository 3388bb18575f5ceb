"""What lies in a checkpoint folder, from one look at it.

The folder is read once and every link in it followed once; whatever opens a checkpoint takes the :class:`Listing`.

Each file is classified by its name. What is copied beside the weights is an allow-list: a file that nobody thought of
may hold an unprotected copy of the weights, so only files known to belong to the tokenizer, the processor, the
configuration or the licence are copied.

A link may lead to a file of the same folder or, as in the Hugging Face hub's cache, from ``snapshots/<revision>/`` to
the ``blobs`` folder of the same cache. Any other target could be a private file that a stranger's checkpoint wants read
or published.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.disk import read_file
from unmergeable.checkpoint.header import strict_json
from unmergeable.checkpoint.modules import COPIED, MAX_BYTES, MODULES_NAME, module_folders
from unmergeable.errors import CheckpointError

CONFIG_NAME = "config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
MANIFEST_NAME = "unmergeable.json"
CARD_NAME = "README.md"

MAX_JSON_BYTES = 256_000_000
"""An index of a million tensors takes about 100 MB."""

MAY_HOLD_A_COPY = "may hold an unprotected copy of the weights"
NOT_ON_THE_LIST = "not on the list of files that are copied"
IS_CODE = "code is not copied"
IS_FOLDER = "folders are not copied"
LEAVES_THE_FOLDER = "a link that leaves the folder"
NOT_A_FILE = "not a regular file"
DESCRIBES_ITS_SOURCE = "a new one is written"
LEFT_BY_A_KILLED_RUN = "left behind by a run that was killed"


class Kind(Enum):
    """What a name in a checkpoint folder stands for."""

    CONFIG = "the model's configuration"
    ADAPTER_CONFIG = "the configuration of an adapter"
    WEIGHTS = "weights in safetensors"
    WEIGHTS_INDEX = "the index of weights in several safetensors files"
    PICKLED_WEIGHTS = "weights in a pickle"
    OTHER_WEIGHTS = "weights in another format"
    WEIGHTS_FOLDER = "a folder that may hold weights"
    FOLDER = "another folder"
    MANIFEST = "the manifest of a checkpoint that this package wrote"
    CODE = "code"
    SIDE_FILE = "a file to be copied"
    FOREIGN_LINK = "a link, under the name of a side file, that leaves the folder"
    NO_FILE = "a pipe, socket or device under the name of a side file"
    LEFTOVER = "a temporary file of a run that was killed"
    OTHER = "anything else"


_REASON = {
    Kind.WEIGHTS: MAY_HOLD_A_COPY,
    Kind.WEIGHTS_INDEX: MAY_HOLD_A_COPY,
    Kind.PICKLED_WEIGHTS: MAY_HOLD_A_COPY,
    Kind.OTHER_WEIGHTS: MAY_HOLD_A_COPY,
    Kind.WEIGHTS_FOLDER: MAY_HOLD_A_COPY,
    Kind.FOLDER: IS_FOLDER,
    Kind.MANIFEST: DESCRIBES_ITS_SOURCE,
    Kind.CODE: IS_CODE,
    Kind.FOREIGN_LINK: LEAVES_THE_FOLDER,
    Kind.NO_FILE: NOT_A_FILE,
    Kind.LEFTOVER: LEFT_BY_A_KILLED_RUN,
}

_DOCUMENTS = r"(LICEN[SC]E | NOTICE | USE_POLICY)([-_][-\w]*)?(\.(md|txt|rst|html|pdf))? | README\.md"
_SIDE_FILES = rf"""
    tokenizer\.json | tokenizer_config\.json | tokenizer\.model(\.v\d+)? | sentencepiece\.bpe\.model | spiece\.model
    | tekken\.json | [a-z]+\.tiktoken | [a-z]+\.spm | bpe\.codes
    | special_tokens_map\.json | added_tokens\.json | merges\.txt | vocab\.[a-z]+
    | chat_template\.[a-z0-9]+ | ([a-z]+_)?preprocessor_config\.json | processor_config\.json
    | generation_config\.json | modules\.json | config_sentence_transformers\.json | sentence_[a-z]+_config\.json
    | {_DOCUMENTS}
"""
_OTHER_WEIGHTS = r"""
    .*\.(bin|pth|pt|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|tflite|npz|npy|pkl|pickle|ot|mar|nemo|engine|mlmodel
    |bin\.index\.json) | consolidated.* | optimizer.*
"""
# The first pattern that fits decides, without regard to case: a licence called LICENSE.safetensors is weights.
_BY_NAME = [
    (kind, re.compile(pattern, re.VERBOSE | re.IGNORECASE))
    for kind, pattern in (
        (Kind.LEFTOVER, r"\.unmergeable-.*\.tmp"),
        (Kind.WEIGHTS, r".*\.safetensors"),
        (Kind.WEIGHTS_INDEX, r".*\.safetensors\.index.*\.json"),
        (Kind.OTHER_WEIGHTS, _OTHER_WEIGHTS),
        (Kind.CODE, r".*\.(py|ipynb|sh)"),
        (Kind.SIDE_FILE, _SIDE_FILES),
    )
]
_PICKLES = re.compile(r"(pytorch_model|diffusion_pytorch_model|model|adapter_model)([-.].*)?\.(bin|pth|pt)")
_FOR_PEOPLE = re.compile(rf"{_DOCUMENTS} | [-\w]+\.(png|jpe?g|gif|webp|svg)", re.VERBOSE | re.IGNORECASE)
_WEIGHTS_FOLDERS = re.compile(r"original|onnx|gguf|coreml|openvino|global_step.*|checkpoint.*|optimizer.*", re.I)
_BY_EXACT_NAME = {CONFIG_NAME: Kind.CONFIG, ADAPTER_CONFIG_NAME: Kind.ADAPTER_CONFIG, MANIFEST_NAME: Kind.MANIFEST}

FileState = tuple[int, int]
"""Size in bytes and modification time in nanoseconds, which change when somebody replaces a file."""


@dataclass(frozen=True)
class LeftOut:
    """A file or folder (its name ends in ``/``) of the source that is not copied."""

    name: str
    reason: str


@dataclass(frozen=True)
class ListedFile:
    """One name in a folder. ``path`` has links followed; ``problem`` says why the file must not be opened, if so."""

    name: str
    kind: Kind
    path: Path
    state: FileState
    problem: str | None = None

    @property
    def is_folder(self) -> bool:
        return self.kind in (Kind.FOLDER, Kind.WEIGHTS_FOLDER)


@dataclass(frozen=True)
class Listing:
    """A folder and what lay in it when it was listed, by name and in order of name."""

    folder: Path
    files: Mapping[str, ListedFile]

    @property
    def is_adapter(self) -> bool:
        """Whether this is an adapter (peft) rather than a whole checkpoint."""
        return self._holds(Kind.ADAPTER_CONFIG)

    @property
    def is_pickled(self) -> bool:
        return self._holds(Kind.PICKLED_WEIGHTS) and not self._holds(Kind.WEIGHTS, Kind.WEIGHTS_INDEX)

    def names(self, *kinds: Kind) -> list[str]:
        return [name for name, file in self.files.items() if file.kind in kinds]

    def file(self, name: str) -> ListedFile:
        """The regular file of this name.

        Raises:
            CheckpointError: when it is missing, not a regular file, or a link that leaves the folder.
        """
        file = self.files.get(name)
        if file is None:
            raise CheckpointError(f"{name} is missing from {self.folder}: download it again.")
        if file.problem is not None:
            raise CheckpointError(file.problem)
        return file

    def read_json(self, name: str) -> Any:
        """Parse one JSON file, refusing repeated keys.

        Raises:
            CheckpointError: as :meth:`file`, or when it is too large or not valid JSON.
        """
        file = self.file(name)
        if file.state[0] > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{name} in {self.folder} is larger than {MAX_JSON_BYTES:,} bytes; the file is malformed."
            )
        return strict_json(read_file(file.path), f"{name} in {self.folder}")

    def read_config(self) -> Mapping[str, Any]:
        """Parse ``config.json``.

        Raises:
            CheckpointError: when it is missing or not a JSON object.
        """
        if CONFIG_NAME not in self.files:
            raise CheckpointError(
                f"{self.folder} has no {CONFIG_NAME}: pass the folder of a transformers or diffusers model."
            )
        config = self.read_json(CONFIG_NAME)
        if not isinstance(config, dict):
            raise CheckpointError(f"{CONFIG_NAME} in {self.folder} is not a JSON object; download it again.")
        return config

    def side_files(self, claimed: Collection[str]) -> tuple[dict[str, Path], tuple[LeftOut, ...]]:
        """Split what lies beside the ``claimed`` names into files to copy, by name, and the rest with reasons.

        Files of modules around the network are named with their folder, ``1_Pooling/config.json``.
        """
        copied: dict[str, Path] = {}
        left_out: list[LeftOut] = []
        modules = self._module_folders()
        for name, file in self.files.items():
            if name in claimed:
                continue
            if name in modules:
                inner, rest = _module_files(self.folder, name)
                copied |= inner
                left_out += rest
                continue
            if file.kind is Kind.SIDE_FILE:
                copied[name] = file.path
            else:
                left_out.append(LeftOut(_printable(name) + ("/" if file.is_folder else ""), reason_to_leave_out(file)))
        return copied, tuple(left_out)

    def _module_folders(self) -> frozenset[str]:
        file = self.files.get(MODULES_NAME)
        if file is None or file.problem is not None or file.state[0] > MAX_JSON_BYTES:
            return frozenset()
        folders = module_folders(read_file(file.path))
        return frozenset(name for name in folders if name in self.files and self.files[name].is_folder)

    def states(self, names: Iterable[str]) -> dict[Path, FileState]:
        """Size and time of regular files, by path."""
        return {file.path: file.state for file in map(self.file, names)}

    def _holds(self, *kinds: Kind) -> bool:
        return any(file.kind in kinds for file in self.files.values())


def is_for_people(name: str) -> bool:
    """Whether a file beside a model is a licence, a notice, the card or a picture in it: no program loads it."""
    return _FOR_PEOPLE.fullmatch(name) is not None


def kind_of_name(name: str) -> Kind:
    """What a file of this name is, wherever it lies; folders in the name do not count."""
    return _kind(name.rpartition("/")[2])


def reason_to_leave_out(file: ListedFile) -> str:
    """Why a file is not copied beside weights."""
    return _REASON.get(file.kind, NOT_ON_THE_LIST)


def list_folder(folder: str | os.PathLike[str] | Listing) -> Listing:
    """List a checkpoint folder; a listing is returned as it is.

    Raises:
        CheckpointError: when there is no such folder, or it cannot be read.
    """
    if isinstance(folder, Listing):
        return folder
    folder = Path(folder)
    try:
        with os.scandir(folder) as entries:
            by_name = sorted(entries, key=lambda entry: entry.name)
        real_folder = folder.resolve()
        allowed = (real_folder, *_hub_blobs(real_folder))
        return Listing(folder, {entry.name: _listed(folder, real_folder, entry, allowed) for entry in by_name})
    except FileNotFoundError:
        raise CheckpointError(f"{folder} does not exist: check the path.") from None
    except NotADirectoryError:
        raise CheckpointError(f"{folder} is a file: pass the folder that holds it and its {CONFIG_NAME}.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise CheckpointError(f"{_printable(str(folder))} cannot be read ({_reason(error)}): check the path.") from None


def _module_files(folder: Path, name: str) -> tuple[dict[str, Path], list[LeftOut]]:
    """The files of one module to copy, and what is left out of its folder."""
    copied: dict[str, Path] = {}
    left_out: list[LeftOut] = []
    for inner in list_folder(folder / name).files.values():
        path = f"{name}/{inner.name}"
        if inner.name in COPIED and inner.problem is None and inner.state[0] <= MAX_BYTES:
            copied[path] = inner.path
        else:
            left_out.append(LeftOut(_printable(path), reason_to_leave_out(inner)))
    return copied, left_out


def _listed(folder: Path, real_folder: Path, entry: os.DirEntry[str], allowed: Collection[Path]) -> ListedFile:
    name, path = entry.name, real_folder / entry.name
    try:
        if entry.is_symlink():
            path = path.resolve(strict=True)
        status = path.stat() if entry.is_symlink() else entry.stat(follow_symlinks=False)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        missing = f"{name} is missing from {folder}: download it again."
        return ListedFile(name, _kind(name, is_foreign=True), path, (0, 0), missing)
    state = (status.st_size, status.st_mtime_ns)
    if stat.S_ISDIR(status.st_mode):
        kind = Kind.WEIGHTS_FOLDER if _WEIGHTS_FOLDERS.fullmatch(name) else Kind.FOLDER
        return ListedFile(name, kind, path, state, f"{name} in {folder} is not a regular file; remove it.")
    if not stat.S_ISREG(status.st_mode):
        kind = _kind(name)
        kind = Kind.NO_FILE if kind is Kind.SIDE_FILE else kind
        return ListedFile(name, kind, path, state, f"{name} in {folder} is not a regular file; remove it.")
    if path.parent not in allowed:
        leaves = f"{name} in {folder} is a link that leaves the folder; replace it by the file itself."
        return ListedFile(name, _kind(name, is_foreign=True), path, state, leaves)
    return ListedFile(name, _kind(name), path, state)


def _kind(name: str, *, is_foreign: bool = False) -> Kind:
    if name in _BY_EXACT_NAME:
        return _BY_EXACT_NAME[name]
    if _PICKLES.fullmatch(name):
        return Kind.PICKLED_WEIGHTS
    kind = next((kind for kind, pattern in _BY_NAME if pattern.fullmatch(name)), Kind.OTHER)
    return Kind.FOREIGN_LINK if kind is Kind.SIDE_FILE and is_foreign else kind


def _hub_blobs(real_folder: Path) -> tuple[Path, ...]:
    """The ``blobs`` folder of the cache that holds this snapshot, unless it is a link to somewhere else."""
    for ancestor in real_folder.parents:
        if ancestor.name == "snapshots":
            blobs = ancestor.parent / "blobs"
            return (blobs,) if blobs.is_dir() and not blobs.is_symlink() else ()
    return ()


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)[1:-1]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
