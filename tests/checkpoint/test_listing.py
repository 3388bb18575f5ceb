"""A folder is looked through once, and what is copied is known to be harmless and lies inside it."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from unmergeable.checkpoint.listing import (
    DESCRIBES_ITS_SOURCE,
    IS_CODE,
    IS_FOLDER,
    LEAVES_THE_FOLDER,
    LEFT_BY_A_KILLED_RUN,
    MAY_HOLD_A_COPY,
    NOT_A_FILE,
    NOT_ON_THE_LIST,
    Kind,
    LeftOut,
    list_folder,
)
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import CheckpointError

COPIED = """
    tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json merges.txt
    vocab.json vocab.txt spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json
    preprocessor_config.json image_preprocessor_config.json processor_config.json generation_config.json LICENSE
    LICENSE.txt LICENCE.md LICENSE-MODEL NOTICE NOTICE.txt README.md tekken.json
""".split()  # noqa: SIM905 - a list of words
MAY_BE_WEIGHTS = """
    pytorch_model.bin pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json weights.pth x.pt last.ckpt
    model.gguf model-Q4.GGUF model.onnx model.onnx_data consolidated.00.pth consolidated.safetensors optimizer.pt
    optimizer.bin tf_model.h5 flax_model.msgpack other.safetensors model.fp16.safetensors
    x.safetensors.index.json LICENSE.safetensors vocab.bin tokenizer.pickle README.npz
""".split()  # noqa: SIM905 - a list of words
OTHERS = {
    "modeling_x.py": IS_CODE,
    "notebook.ipynb": IS_CODE,
    "training_args.json": NOT_ON_THE_LIST,
    "trainer_state.json": NOT_ON_THE_LIST,
    "LICENSE.zip": NOT_ON_THE_LIST,
    "README.md.bak": NOT_ON_THE_LIST,
    "vocab.tar.gz": NOT_ON_THE_LIST,
    "unmergeable.json": DESCRIBES_ITS_SOURCE,
    ".unmergeable-0123456789abcdef.77.tmp": LEFT_BY_A_KILLED_RUN,
}
FOLDERS = {"original": MAY_HOLD_A_COPY, "onnx": MAY_HOLD_A_COPY, "checkpoint-500": MAY_HOLD_A_COPY, "runs": IS_FOLDER}


def test_the_allow_list(tmp_path: Path) -> None:
    for name in (*COPIED, *MAY_BE_WEIGHTS, *OTHERS):
        (tmp_path / name).touch()
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "claimed.json").touch()

    copied, left_out = list_folder(tmp_path).side_files({"claimed.json"})

    assert list(copied) == sorted(COPIED)
    reasons = (
        dict.fromkeys(MAY_BE_WEIGHTS, MAY_HOLD_A_COPY) | OTHERS | {f"{name}/": why for name, why in FOLDERS.items()}
    )
    assert {item.name: item.reason for item in left_out} == reasons


def test_a_link_that_leaves_the_folder_is_not_copied(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "secret").write_text("private key")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    (folder / "terms.txt").write_text("inside")
    (folder / "NOTICE").symlink_to("terms.txt")
    (folder / "README.md").symlink_to("nowhere")

    copied, left_out = list_folder(folder).side_files(())

    assert copied == {"NOTICE": folder.resolve() / "terms.txt"}
    assert LeftOut("LICENSE", LEAVES_THE_FOLDER) in left_out
    assert LeftOut("README.md", LEAVES_THE_FOLDER) in left_out


@pytest.mark.parametrize("component", ["", "unet"])
def test_links_into_the_hub_cache_are_followed(tmp_path: Path, component: str) -> None:
    repository = tmp_path / "hub" / "models--o--m"
    snapshot = repository / "snapshots" / "abc" / component
    blob = repository / "blobs" / "0123"
    for folder in (snapshot, blob.parent):
        folder.mkdir(parents=True)
    blob.write_text("{}")
    up = "../" * len(snapshot.relative_to(repository).parts)
    (snapshot / "config.json").symlink_to(f"{up}blobs/0123")
    (snapshot / "stolen.json").symlink_to(f"{up}refs")
    (repository / "refs").write_text("not a blob")

    listing = list_folder(snapshot)
    assert listing.file("config.json").path == blob.resolve()
    with pytest.raises(CheckpointError, match="leaves the folder"):
        listing.file("stolen.json")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (("config.json", "not a regular file"), ("absent", "missing"), ("loop", "missing")):
        with pytest.raises(CheckpointError, match=message):
            list_folder(tmp_path).file(name)


def test_blobs_that_are_a_link_are_not_part_of_the_cache(tmp_path: Path) -> None:
    """Or a folder in the shape of a cache could name any private folder its blobs."""
    private = tmp_path / "private"
    snapshot = tmp_path / "models--o--m" / "snapshots" / "abc"
    for folder in (private, snapshot):
        folder.mkdir(parents=True)
    (private / "id_ed25519").write_text("private key")
    (snapshot / "LICENSE").symlink_to("../../blobs/id_ed25519")
    blobs = tmp_path / "models--o--m" / "blobs"

    blobs.symlink_to(private)
    copied, left_out = list_folder(snapshot).side_files(())
    assert (copied, left_out) == ({}, (LeftOut("LICENSE", LEAVES_THE_FOLDER),))

    blobs.unlink()  # the control: the same file in a real folder of that name
    private.rename(blobs)
    assert list(list_folder(snapshot).side_files(())[0]) == ["LICENSE"]


def test_names_that_a_terminal_or_json_cannot_show(tmp_path: Path) -> None:
    for name in (b"clear\x1b[2J.md", b"not-utf8-\xff"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).touch()
    assert [item.name for item in list_folder(tmp_path).side_files(())[1]] == ["clear\\x1b[2J.md", "not-utf8-\\udcff"]


def test_a_pipe_is_neither_copied_nor_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    os.mkfifo(tmp_path / "config.json")
    listing = list_folder(tmp_path)
    assert listing.side_files({"config.json"}) == ({}, (LeftOut("README.md", NOT_A_FILE),))
    with pytest.raises(CheckpointError, match="not a regular file"):
        listing.read_config()


def test_kinds_decide_how_a_folder_is_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    assert list_folder(tmp_path).is_pickled
    (tmp_path / "model.safetensors").touch()
    listing = list_folder(tmp_path)
    assert not listing.is_pickled
    assert not listing.is_adapter
    assert listing.names(Kind.WEIGHTS, Kind.PICKLED_WEIGHTS) == ["model.safetensors", "pytorch_model.bin"]
    (tmp_path / "adapter_config.json").touch()
    assert list_folder(tmp_path).is_adapter
    assert not listing.is_adapter, "a listing is what was there when it was made"


class Touched:
    """Counts what is asked of the file system below a folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
        self._folders = tuple(map(str, folders))
        self.listed: Counter[str] = Counter()
        self.opened: Counter[str] = Counter()
        for name, counter in (("scandir", self.listed), ("listdir", self.listed), ("open", self.opened)):
            self._count(monkeypatch, os, name, counter)
        self._count(monkeypatch, io, "open", self.opened)

    def _count(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, counter: Counter[str]) -> None:
        original = getattr(module, name)

        def counting(path: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(path, int) and os.fspath(path).startswith(self._folders):
                counter[os.fspath(path)] += 1
            return original(path, *args, **kwargs)

        monkeypatch.setattr(module, name, counting)


def test_opening_lists_a_folder_once_and_opens_each_file_once(
    two_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched = Touched(monkeypatch, two_shards)

    open_checkpoint(two_shards)

    assert touched.listed == {str(two_shards): 1}
    read = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert touched.opened == {str(two_shards / name): 1 for name in [*read, "model.safetensors.index.json"]}


def test_opening_an_adapter_lists_both_folders_once(
    tmp_path: Path, single: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = single(tmp_path / "base", {"q.weight": torch.ones(4, 4)}), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    lora = {"lora_A.weight": torch.ones(1, 4), "lora_B.weight": torch.ones(4, 1)}
    save_file(
        {f"base_model.model.q.{name}": value for name, value in lora.items()}, adapter / "adapter_model.safetensors"
    )
    touched = Touched(monkeypatch, base, adapter)

    open_checkpoint(adapter, base=base)

    assert touched.listed == {str(base): 1, str(adapter): 1}
    assert set(touched.opened.values()) == {1}
    assert {Path(path).name for path in touched.opened} == {
        "config.json",
        "model.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
