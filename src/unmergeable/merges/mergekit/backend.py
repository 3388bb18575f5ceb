"""The real mergekit in a process of its own: what somebody who merges your checkpoint is most likely to run.

mergekit is not imported: its class-level caches serve stale weights, and what is measured should be the tool itself.
What it writes is compared with the models it was given before anybody sees it. mergekit drops tensors that its table
of an architecture does not list (the biases of a Llama with ``attention_bias``) without a word, and a model without
its biases looks like one that was protected.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unmergeable.checkpoint.correspondence import corresponding_names
from unmergeable.checkpoint.disk import write_file
from unmergeable.checkpoint.header import TensorSpec
from unmergeable.checkpoint.listing import CONFIG_NAME, MANIFEST_NAME
from unmergeable.checkpoint.manifest import FileRecord, Manifest, by_name, installed_version, record_file, record_header
from unmergeable.checkpoint.partial import PartialFolder, require_absent
from unmergeable.checkpoint.reader import Checkpoint
from unmergeable.checkpoint.source import TensorSource, shapes_of
from unmergeable.checkpoint.spare import is_spare
from unmergeable.errors import BadInput, UnmergeableError, UsageError
from unmergeable.merges.mergekit.documents import with_donor
from unmergeable.merges.models import require_nothing_lost, stored_as
from unmergeable.merges.vocabularies import is_vocabulary

logger = logging.getLogger(__name__)

COMMAND = "mergekit-yaml"


def merge_with_mergekit(
    document: Mapping[str, Any],
    inputs: Mapping[str, TensorSource],
    out: Path,
    *,
    out_dtype: torch.dtype | None = None,
    template: TensorSource | None = None,
    tokens_may_differ: bool = False,
    seed: int = 0,
    checksums: bool = False,
    threads: int | None = None,
) -> Manifest:
    """Run ``mergekit-yaml`` and accept its result only if no tensor is lost.

    Args:
        document: the configuration, with absolute paths.
        inputs: the models by role.
        out: the folder to create; it appears complete or not at all.
        out_dtype: the dtype the configuration asks for; None for that of the models.
        template: says which tensors the merge must hold; None for the first of the inputs.
        tokens_may_differ: whether the configuration chooses a tokenizer, and with it the number of rows.
        seed: for methods that draw masks.
        checksums: record the SHA-256 of every file read and written; without, sizes and those of headers.
        threads: as many as mergekit's arithmetic may use; None for its own choice.

    Raises:
        UsageError: when mergekit is not installed.
        Mismatch: naming the first tensor that mergekit lost or changed the shape or dtype of.
        UnmergeableError: when mergekit fails, with the last line it said.
    """
    command = find_command()
    require_absent(out)
    if not out.absolute().parent.is_dir():
        raise BadInput(f"{out} cannot be created: its parent folder does not exist; create it first.")
    template = template or next(iter(inputs.values()))
    token = hashlib.sha256(json.dumps([document, seed], default=str).encode()).hexdigest()
    with PartialFolder(out.absolute(), f"mergekit {token}") as folder, tempfile.TemporaryDirectory() as scratch:
        folder.remove_all_but(())  # mergekit cannot resume
        try:
            config = Path(scratch) / "config.yaml"
            config.write_text(json.dumps(with_donor(document)))  # JSON is YAML
            _run([command, str(config), str(folder.files), *_options(seed, threads)], scratch)
            # mergekit's own file names the folders of this machine.
            (folder.files / "mergekit_config.yml").unlink(missing_ok=True)
            (folder.files / "README.md").unlink(missing_ok=True)
            merged = Checkpoint.open(folder.files)
            expected = _expected(template, merged, out_dtype, tokens_may_differ=tokens_may_differ)
            require_nothing_lost(expected, merged)
            merged.close()
            manifest = Manifest(
                outputs=_written(folder.files, checksums=checksums),
                inputs={role: _records(source, checksums=checksums) for role, source in inputs.items()},
                details={
                    "recipe": {
                        "merge": document.get("merge_method"),
                        "backend": f"mergekit {installed_version('mergekit')}",
                        "parameters": document.get("parameters", {}),
                        "seed": seed,
                    }
                },
            )
            write_file(folder.files / MANIFEST_NAME, manifest.to_json().encode())
        except BaseException:
            folder.discard()
            raise
        folder.commit()
    return manifest


def _expected(
    template: TensorSource, merged: TensorSource, out_dtype: torch.dtype | None, *, tokens_may_differ: bool
) -> dict[str, TensorSpec]:
    """The tensors that may not be lost; masks and second copies of tied weights, which mergekit leaves out, may.

    They are named as in the merge: mergekit writes the names of its own table, whatever prefixes the models have.
    """
    expected = {}
    found = corresponding_names(shapes_of(template), shapes_of(merged))
    for name in template.names:
        spec, there = stored_as(template.spec(name), out_dtype), found.get(name)
        if there is None and is_spare(name, template.config):
            continue
        if tokens_may_differ and is_vocabulary(name) and there is not None:
            spec = TensorSpec(spec.dtype, (merged.spec(there).shape[0], *spec.shape[1:]))
        expected[there or name] = spec
    return expected


def find_command() -> str:
    """Where ``mergekit-yaml`` is: beside this Python, or on the path.

    Raises:
        UsageError: when it is nowhere.
    """
    beside = Path(sys.executable).parent / COMMAND
    command = str(beside) if beside.is_file() else shutil.which(COMMAND)
    if command is None:
        raise UsageError(f"{COMMAND} is not installed; run: pip install 'unmergeable[mergekit]'.")
    return command


def _options(seed: int, threads: int | None) -> list[str]:
    options = ["--quiet", "--no-write-model-card", "--random-seed", str(seed)]
    return options if threads is None else [*options, "--num-threads", str(threads)]


def _run(command: list[str], folder: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    logger.debug("%s: %s%s", COMMAND, finished.stdout, finished.stderr)
    if finished.returncode != 0:
        said = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
        last = said[-1] if said else "nothing said"
        raise UnmergeableError(f"{COMMAND} failed with exit code {finished.returncode}: {last} (--debug shows more).")


def _records(source: TensorSource, *, checksums: bool) -> tuple[FileRecord, ...]:
    """The files of an input that hold tensors or their configuration."""
    index = source.index
    shards = {shard.path: shard.name for shard in index.shards.values() if shard.path is not None}
    small = {index.config_file: CONFIG_NAME} | dict(index.other_files)
    record = record_file if checksums else record_header
    return by_name(
        [record(path, name) for path, name in shards.items()]
        + [record_file(path, name) for path, name in small.items() if path not in shards]
    )


def _written(folder: Path, *, checksums: bool) -> tuple[FileRecord, ...]:
    return by_name(
        [
            record_file(path) if checksums or path.suffix != ".safetensors" else record_header(path)
            for path in folder.iterdir()
        ]
    )
