"""What is copied beside the weights, and what is left out and why.

An allow-list: a file that nobody thought of may hold an unprotected copy of the weights, so only files known to
belong to the tokenizer, the processor, the configuration or the licence are copied.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from unmergeable.errors import CheckpointError

CONFIG_NAME = "config.json"
MANIFEST_NAME = "unmergeable.json"

_COPIED = re.compile(
    r"""
    tokenizer\.json | tokenizer_config\.json | tokenizer\.model(\.v\d+)? | sentencepiece\.bpe\.model | spiece\.model
    | tekken\.json | [a-z]+\.tiktoken | [a-z]+\.spm | bpe\.codes
    | special_tokens_map\.json | added_tokens\.json | merges\.txt | vocab\.[a-z]+
    | chat_template\.[a-z0-9]+ | ([a-z]+_)?preprocessor_config\.json | processor_config\.json
    | generation_config\.json
    | (LICEN[SC]E | NOTICE | USE_POLICY)([-_][-\w]*)?(\.(md|txt|rst|html|pdf))? | README\.md
    """,
    re.VERBOSE | re.IGNORECASE,
)
_TOKENIZER = re.compile(
    r"tokenizer.*|sentencepiece.*|spiece.*|tekken.*|.*\.tiktoken|.*\.spm|bpe\.codes|special_tokens_map.*|added_tokens.*"
    r"|merges\..*|vocab\..*|chat_template.*",
    re.IGNORECASE,
)
_TERMS = re.compile(r"(LICEN[SC]E|NOTICE|USE_POLICY).*", re.IGNORECASE)
_WEIGHTS = re.compile(
    r".*\.(bin|pth|pt|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|tflite|safetensors|npz|npy|pkl|pickle|ot|mar|nemo"
    r"|engine|mlmodel|bin\.index\.json)|consolidated.*|optimizer.*|.*\.safetensors\.index.*\.json",
    re.IGNORECASE,
)
_WEIGHT_FOLDERS = re.compile(
    r"original|onnx|gguf|coreml|openvino|global_step.*|checkpoint.*|optimizer.*", re.IGNORECASE
)

MAY_HOLD_A_COPY = "may hold an unprotected copy of the weights"
NOT_ON_THE_LIST = "not on the list of files that are copied"
IS_CODE = "code is not copied"
IS_FOLDER = "folders are not copied"
LEAVES_THE_FOLDER = "a link that leaves the folder"
DESCRIBES_ITS_SOURCE = "a new one is written"
BASE_HAS_ONE = "the base has one of the same name, which is kept"


@dataclass(frozen=True)
class LeftOut:
    """A file or folder (its name ends in ``/``) of the source that is not copied."""

    name: str
    reason: str


def resolve_inside(folder: Path, name: str) -> Path:
    """The file ``name`` of ``folder``, links followed.

    A link may lead within the folder or, as in the Hugging Face hub's cache, from ``snapshots/<revision>/`` to
    ``blobs/``. Any other target could be a private file that a stranger's checkpoint wants read or published.

    Raises:
        CheckpointError: for a file that is missing, not a regular file, or elsewhere.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{name} is missing from {folder}: download it again.") from error
    if not real.is_file():
        raise CheckpointError(f"{name} in {folder} is not a regular file; remove it.")
    root = folder.resolve()
    if real.parent != root and real.parent not in _hub_blobs(folder.absolute()) + _hub_blobs(root):
        raise CheckpointError(f"{name} in {folder} is a link that leaves the folder; replace it by the file itself.")
    return real


def _hub_blobs(folder: Path) -> tuple[Path, ...]:
    """The ``blobs`` folder beside the ``snapshots`` folder that ``folder`` lies in, resolved, if there is one."""
    return tuple((ancestor.parent / "blobs").resolve() for ancestor in folder.parents if ancestor.name == "snapshots")


def sort_side_files(folder: Path, claimed: frozenset[str]) -> tuple[tuple[Path, ...], tuple[LeftOut, ...]]:
    """Split what lies in ``folder`` beside the ``claimed`` names into files to copy and what is left out.

    Returns the files to copy, sorted by name (``folder / name``, links not resolved), and the rest with reasons.
    """
    copied: list[Path] = []
    left_out: list[LeftOut] = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name in claimed:
            continue
        reason = reason_to_leave_out(folder, path)
        if reason is None:
            copied.append(path)
        else:
            left_out.append(LeftOut(path.name + ("/" if path.is_dir() else ""), reason))
    return tuple(copied), tuple(left_out)


def reason_to_leave_out(folder: Path, path: Path) -> str | None:
    """Why ``path`` is not copied, or None if it is."""
    name = path.name
    if path.is_dir():
        return MAY_HOLD_A_COPY if _WEIGHT_FOLDERS.fullmatch(name) else IS_FOLDER
    if _WEIGHTS.fullmatch(name):
        return MAY_HOLD_A_COPY
    if name == MANIFEST_NAME:
        return DESCRIBES_ITS_SOURCE
    if name.endswith((".py", ".ipynb", ".sh")):
        return IS_CODE
    if not _COPIED.fullmatch(name):
        return NOT_ON_THE_LIST
    try:
        resolve_inside(folder, name)
    except CheckpointError:
        return LEAVES_THE_FOLDER
    return None


def combine_side_files(base: tuple[Path, ...], own: tuple[Path, ...]) -> tuple[tuple[Path, ...], tuple[LeftOut, ...]]:
    """Side files of an adapter on its base: what to copy, sorted by name, and what of its own is left out.

    The adapter's files replace the base's, and a tokenizer comes wholly from one of the two. Only the base's
    licence is never replaced: the result is a derivative of it.
    """
    brings_tokenizer = any(_TOKENIZER.fullmatch(path.name) for path in own)
    kept = {path.name: path for path in base if not (brings_tokenizer and _TOKENIZER.fullmatch(path.name))}
    left_out: list[LeftOut] = []
    for path in own:
        if _TERMS.fullmatch(path.name) and path.name in kept:
            left_out.append(LeftOut(path.name, BASE_HAS_ONE))
        else:
            kept[path.name] = path
    return tuple(kept[name] for name in sorted(kept)), tuple(left_out)
