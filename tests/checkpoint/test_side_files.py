"""What is copied beside the weights: only what is known to be harmless, only from inside the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmergeable.checkpoint.side_files import (
    BASE_HAS_ONE,
    DESCRIBES_ITS_SOURCE,
    IS_CODE,
    IS_FOLDER,
    LEAVES_THE_FOLDER,
    MAY_HOLD_A_COPY,
    NOT_ON_THE_LIST,
    LeftOut,
    combine_side_files,
    resolve_inside,
    sort_side_files,
)
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
}
FOLDERS = {"original": MAY_HOLD_A_COPY, "onnx": MAY_HOLD_A_COPY, "checkpoint-500": MAY_HOLD_A_COPY, "runs": IS_FOLDER}


def test_the_allow_list(tmp_path: Path) -> None:
    for name in (*COPIED, *MAY_BE_WEIGHTS, *OTHERS):
        (tmp_path / name).touch()
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "claimed.json").touch()

    copied, left_out = sort_side_files(tmp_path, frozenset({"claimed.json"}))

    assert [path.name for path in copied] == sorted(COPIED)
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

    copied, left_out = sort_side_files(folder, frozenset())

    assert [path.name for path in copied] == ["NOTICE"]
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

    assert resolve_inside(snapshot, "config.json") == blob.resolve()
    with pytest.raises(CheckpointError, match="leaves the folder"):
        resolve_inside(snapshot, "stolen.json")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (("config.json", "not a regular file"), ("absent", "missing"), ("loop", "missing")):
        with pytest.raises(CheckpointError, match=message):
            resolve_inside(tmp_path, name)


def test_an_adapter_brings_its_tokenizer_whole_and_keeps_the_base_licence() -> None:
    base = tuple(Path("base") / name for name in ("LICENSE", "generation_config.json", "tokenizer.model", "vocab.json"))
    own = tuple(Path("adapter") / name for name in ("LICENSE", "README.md", "tokenizer.json"))

    combined, left_out = combine_side_files(base, own)

    assert [str(path) for path in combined] == [
        "base/LICENSE",
        "adapter/README.md",
        "base/generation_config.json",
        "adapter/tokenizer.json",
    ]
    assert left_out == (LeftOut("LICENSE", BASE_HAS_ONE),)
    without_tokenizer, _ = combine_side_files(base, own[:2])
    assert {"tokenizer.model", "vocab.json"} <= {path.name for path in without_tokenizer}
