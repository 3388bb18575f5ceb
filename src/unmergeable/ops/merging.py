"""Merge: what a free-rider does with your checkpoint and theirs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.hub import folder_of
from unmergeable.checkpoint.index import is_adapter
from unmergeable.checkpoint.open import open_checkpoint, split_adapter
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges import MERGES, engine, merge_method
from unmergeable.merges.learning import learnt_from_data
from unmergeable.merges.mergekit.backend import find_command, merge_with_mergekit
from unmergeable.merges.mergekit.config import read_config, read_document
from unmergeable.merges.mergekit.documents import absolute_paths, document_of, models_named, open_model
from unmergeable.merges.mergekit.meaning import meaning_of
from unmergeable.merges.variation import terms_of
from unmergeable.ops.adapter_merging import merge_adapters, settings_of_merge
from unmergeable.progress import Progress, silent
from unmergeable.settings import settings_of

Backend = Literal["own", "mergekit"]

Expert = str | os.PathLike[str] | tuple[str | os.PathLike[str], float | None]
"""A checkpoint, or one with its coefficient."""


@dataclass(frozen=True)
class MergeResult:
    """What was merged, with which coefficients: None where they differ from tensor to tensor.

    ``learnt`` is what a merge learnt from data, None where it took none, and ``summary`` says so in a line.
    """

    out: Path
    method: str
    settings: Mapping[str, Any]
    experts: tuple[tuple[str, float | None], ...]
    tensors: int
    backend: Backend = "own"
    learnt: Mapping[str, Any] | None = None
    summary: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "method": self.method,
            "backend": self.backend,
            "settings": dict(self.settings),
            "experts": [{"path": path, "coefficient": coefficient} for path, coefficient in self.experts],
            "tensors": self.tensors,
            "learnt": None if self.learnt is None else dict(self.learnt),
        }

    def lines(self) -> list[str]:
        """The result for a terminal."""
        by = " by mergekit" if self.backend == "mergekit" else ""
        return [
            f"Merged{by}: {self.out} ({self.method}; {self.tensors} tensors)",
            *(f"  {path}" if value is None else f"  {value:g} of {path}" for path, value in self.experts),
            *([f"  {self.summary}"] if self.summary else []),
        ]


def merge(
    *,
    experts: Sequence[Expert] = (),
    method: str | None = None,
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    settings: Mapping[str, object] | None = None,
    data: Sequence[str | os.PathLike[str]] = (),
    config: str | os.PathLike[str] | None = None,
    backend: Backend = "own",
    keep_adapter: bool = False,
    seed: int = 0,
    checksums: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> MergeResult:
    """Merge experts of one base into a new checkpoint.

    Args:
        experts: folders, or ``hub:OWNER/NAME``; each alone, or with its coefficient (None for the method's default). An
            adapter is merged into ``base`` first, or, as ``BASE+ADAPTER``, into another.
        method: a merge (``methods`` lists them).
        out: folder to create.
        base: the common base; ``linear`` and ``slerp`` do without.
        settings: of the method; with ``backend="mergekit"``, parameters of mergekit's method of that name.
        data: what a merge learns from, if it does: local files or folders (see ``unmergeable.data``), one for each
            expert and in their order; for ``soup`` any number.
        config: a mergekit configuration instead of all the above but ``out``.
        keep_adapter: merge LoRA adapters into an adapter, without their base, by a method of
            :mod:`unmergeable.merges.adapters`.
        backend: ``mergekit`` runs the installed mergekit and refuses its result if a tensor is lost.
        seed: of mergekit's random masks. This package's own are drawn from the method's ``seed`` setting.
        checksums: record the SHA-256 of every file read and written; without, that of their headers, and sizes.
        threads: tensors merged at a time; None for one per processor.
        progress: told of the bytes ranked and written.

    Raises:
        UsageError: unknown method or setting, a coefficient the method cannot use, too few experts, missing data.
        BadInput: a configuration that cannot be read or means nothing here, or data that cannot.
        Mismatch: the checkpoints do not belong together, or mergekit lost a tensor; names the tensor.
    """
    if backend not in ("own", "mergekit"):
        raise UsageError(f"no backend is called {backend!r}; known: own, mergekit.")
    if keep_adapter:
        if backend != "own" or config is not None or data or method is None:
            raise UsageError("keep_adapter merges adapters by a method of its own: leave out config, data and backend.")
        return _merge_adapters(experts, method, settings or {}, Path(out))
    if backend == "mergekit":
        find_command()
    out = Path(out)
    if config is not None:
        if experts or method is not None or base is not None or settings or data:
            raise UsageError("give either a configuration file, or experts with --method, --base, --set and --data.")
        if backend == "mergekit":
            return _merge_config_with_mergekit(Path(config), out, seed=seed, checksums=checksums, threads=threads)
        return _merge_config(Path(config), out, checksums=checksums, threads=threads, progress=progress)
    if method is None:
        raise UsageError("name the merge with --method, or give a mergekit configuration file.")
    MERGES.require(method)
    base_folder = None if base is None else folder_of(base)
    if base_folder is not None and not base_folder.exists():
        raise BadInput(
            f"base {base_folder} does not exist; give the folder of the checkpoint the experts were fine-tuned from."
        )
    given = [expert if isinstance(expert, tuple) else (expert, None) for expert in experts]
    names = [os.fspath(name) for name, _ in given]
    folders = [_folder_and_base(name, base_folder) for name in names]
    coefficients: list[float | None] = [coefficient for _, coefficient in given]
    base_source = None if base_folder is None else open_checkpoint(base_folder)
    sources = [open_checkpoint(folder, base=of) for folder, of in folders]
    if backend == "mergekit":
        if data:
            raise UsageError("mergekit merges without data; leave out --data, or --backend.")
        resolved = merge_method(method).resolve(coefficients)
        inputs = {} if base_source is None else {"base": base_source}
        inputs |= {f"expert {number}": source for number, source in enumerate(sources, start=1)}
        template = next(iter(inputs.values()))
        pairs = list(zip([_named_for_mergekit(*pair) for pair in folders], resolved, strict=True))
        document = document_of(method, pairs, base_folder, settings or {}, out_dtype=_stored_dtype(template))
        merge_with_mergekit(document, inputs, out, seed=seed, checksums=checksums, threads=threads)
        used = tuple(zip(names, resolved, strict=True))
        return MergeResult(out, method, document["parameters"], used, len(template.names), "mergekit")
    configured = merge_method(method, **(settings or {}))
    weighted = list(zip(sources, coefficients, strict=True))
    data_paths = [Path(path) for path in data]
    with learnt_from_data(configured, base_source, weighted, data_paths, out=out, progress=progress) as learnt:
        engine.merge(
            base_source,
            list(zip(sources, learnt.coefficients, strict=True)),
            learnt.method,
            out,
            vary=learnt.vary,
            checksums=checksums,
            threads=threads,
            progress=progress,
        )
    values = [None] * len(names) if learnt.vary is not None else configured.resolve(learnt.coefficients)
    return MergeResult(
        out,
        method,
        settings_of(configured),
        tuple(zip(names, values, strict=True)),
        len(sources[0].names),
        learnt=learnt.facts,
        summary=learnt.summary,
    )


def _merge_adapters(experts: Sequence[Expert], method: str, settings: Mapping[str, object], out: Path) -> MergeResult:
    given = [expert if isinstance(expert, tuple) else (expert, None) for expert in experts]
    merged, modules = merge_adapters([(folder_of(name), weight) for name, weight in given], method, settings, out)
    used = tuple((os.fspath(name), 1.0 if weight is None else weight) for name, weight in given)
    return MergeResult(out, method, settings_of_merge(merged), used, 2 * modules)


def _folder_and_base(name: str, base: Path | None) -> tuple[Path, Path | None]:
    """The folder of an expert, and of the base of an adapter: the one named with it, or else the common one."""
    path, adapter = split_adapter(name)
    if adapter is None:
        return folder_of(name), base
    for part in (path, adapter):
        if not part.is_dir():
            raise BadInput(f"expert {name}: {part} is no folder; download the model and give its folder.")
    return adapter, path


def _named_for_mergekit(folder: Path, base: Path | None) -> Path:
    """mergekit merges an adapter itself, if it is told its base."""
    return folder if base is None or not is_adapter(folder) else Path(f"{base.absolute()}+{folder.absolute()}")


def _merge_config(config: Path, out: Path, *, checksums: bool, threads: int | None, progress: Progress) -> MergeResult:
    parsed = read_config(config)
    try:
        meaning = meaning_of(parsed)
        # The base first: it is the template.
        named = dict.fromkeys((*filter(None, (parsed.base_model,)), *parsed.models))
        sources = {model: open_model(model, config.parent) for model in named}
        names = next(iter(sources.values())).names
        vary = meaning.vary(names)
        # Everything that can be missing is missed before anything is ranked or written.
        terms = terms_of(meaning.method, [None] * len(meaning.experts), names, vary)
    except BadInput as error:
        raise BadInput(f"{config}: {error}") from None
    engine.merge(
        None if meaning.base is None else sources[meaning.base],
        [(sources[model], None) for model in meaning.experts],
        meaning.method,
        out,
        vary=vary,
        out_dtype=None if parsed.stored_dtype is None else _named_dtype(parsed.stored_dtype),
        checksums=checksums,
        threads=threads,
        progress=progress,
    )
    used = []
    for number, model in enumerate(meaning.experts):
        coefficients = {tensor_terms.coefficients[number] for tensor_terms in terms.values()}
        used.append((model, coefficients.pop() if len(coefficients) == 1 else None))
    return MergeResult(out, meaning.method.name, settings_of(meaning.method), tuple(used), len(names))


def _merge_config_with_mergekit(
    config: Path, out: Path, *, seed: int, checksums: bool, threads: int | None
) -> MergeResult:
    """Have mergekit merge as a configuration says: any that mergekit takes, if it keeps the tensors."""
    document = read_document(config)
    models = models_named(document)
    if not models:
        raise BadInput(f"{config} names no models; list them under models or slices.")
    sources = {model: open_model(model, config.parent) for model in models}
    base = document.get("base_model")
    roles = {base: sources.pop(base), **sources} if isinstance(base, str) else sources
    dtype = document.get("out_dtype") or document.get("dtype")
    merge_with_mergekit(
        absolute_paths(document, config.parent),
        {"base" if role == base else f"model {number}": source for number, (role, source) in enumerate(roles.items())},
        out,
        out_dtype=None if dtype is None else _named_dtype(str(dtype)),
        seed=seed,
        checksums=checksums,
        threads=threads,
    )
    parameters = document.get("parameters") or {}
    listed = tuple((model, None) for model in models if model != base)
    tensors = len(next(iter(roles.values())).names)
    return MergeResult(out, str(document.get("merge_method")), parameters, listed, tensors, "mergekit")


def _named_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise BadInput(f"no dtype is called {name!r}; known: bfloat16, float16, float32, float64.")
    return dtype


def _stored_dtype(template: TensorSource) -> str:
    dtypes = {torch_dtype(template.spec(name).dtype) for name in template.names}
    floats = {str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.is_floating_point}
    if len(floats) != 1:
        raise BadInput(f"{template.description} stores {', '.join(sorted(floats))}: mergekit writes one dtype only.")
    return floats.pop()
