"""Deriving the symmetry map of a network that no family declares, from its config alone."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.architecture.derived import DerivedMap
from unmergeable.checkpoint.disk import remove_leftovers, write_file
from unmergeable.checkpoint.hub import folder_of
from unmergeable.errors import BadInput, UsageError


@dataclass(frozen=True)
class MapResult:
    """A derived map, and the file it was written to, if it was."""

    derived: DerivedMap
    out: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return {**self.derived.to_json(), "out": None if self.out is None else str(self.out)}


def derive_map(model: str | os.PathLike[str], *, out: str | os.PathLike[str] | None = None) -> MapResult:
    """Find and prove the symmetry map of a kind of network, by experiments on a small random copy of it.

    Args:
        model: a checkpoint folder, its ``config.json``, ``hub:OWNER/NAME``, or a ``model_type`` of transformers. No
            weights are read.
        out: file to write the map to, as JSON.

    Raises:
        UsageError: transformers is not installed, or ``out`` exists.
        BadInput: there is no config, or it names no network class that the installed transformers has.
        UnsupportedArchitecture: no small network of this kind can be built or run.
    """
    if out is not None and Path(out).exists():
        remove_leftovers(Path(out))
        raise UsageError(f"{out} exists and is never overwritten; name another file, or move it away.")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise UsageError("deriving a map needs transformers; pip install 'unmergeable[hf]'") from None
    from unmergeable.derivation.build import DIFFUSION, class_named, registered_class
    from unmergeable.derivation.model_types import derive_map as derived_map
    from unmergeable.optional import quiet

    config = _config(model)
    kind = str(config.get("model_type") or config.get("_class_name") or "")
    named = kind if kind in DIFFUSION else next(iter(config.get("architectures") or ()), None)
    network_class = named or registered_class(kind)
    if network_class is None or class_named(network_class) is None:
        raise BadInput(
            f"{os.fspath(model)}: model type {kind or 'missing'!r} names no network class of transformers "
            f"{transformers.__version__}; check the name, or install a version that has it."
        )
    with quiet(transformers):
        derived = derived_map(kind, network_class, config if len(config) > 1 else None)
    if out is not None:
        write_file(Path(out), (json.dumps(derived.to_json(), indent=1) + "\n").encode())
    return MapResult(derived, None if out is None else Path(out))


def _config(model: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The config at a path or on the hub; for the bare name of a model type, one that sets nothing else."""
    text = os.fspath(model)
    path = Path(text) if Path(text).exists() or "/" in text or ":" in text else None
    if path is None:
        return {"model_type": text}
    folder = folder_of(text)
    file = folder if folder.is_file() else folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read ({error}); give a checkpoint folder or a model type.") from None
    if not isinstance(config, dict):
        raise BadInput(f"{file} is not a JSON object; restore the file.")
    return config
