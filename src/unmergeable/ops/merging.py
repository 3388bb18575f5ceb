"""Merge: what a free-rider does with your checkpoint and theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges import MERGES, Merge, engine
from unmergeable.merges.mergekit_backend import find_command, merge_with_mergekit
from unmergeable.merges.mergekit_config import MergeConfig, parse_config, read_config, read_document
from unmergeable.merges.mergekit_meaning import meaning_of
from unmergeable.merges.mergekit_methods import METHODS as MERGEKIT_METHODS
from unmergeable.merges.variation import terms_of
from unmergeable.ops.data_merges import informed_by_data
from unmergeable.ops.named_models import absolute_paths, models_named, open_model
from unmergeable.progress import Progress, silent
from unmergeable.settings import configure, nearest, settings_of

Backend = Literal["own", "mergekit"]


@dataclass(frozen=True)
class MergeResult:
    """What was merged, with which coefficients: None where they differ from tensor to tensor.

    ``learnt`` is what a merge found out from data, None where it took none.
    """

    out: Path
    method: str
    settings: Mapping[str, Any]
    experts: tuple[tuple[str, float | None], ...]
    tensors: int
    backend: Backend = "own"
    learnt: Mapping[str, Any] | None = None

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


def merge(
    *,
    experts: Sequence[tuple[Path, float | None]] = (),
    method: str | None = None,
    out: Path,
    base: Path | None = None,
    settings: Mapping[str, object] | None = None,
    data: Sequence[Path] = (),
    config: Path | None = None,
    backend: Backend = "own",
    seed: int = 0,
    checksums: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> MergeResult:
    """Merge experts of one base into a new checkpoint.

    Args:
        experts: folders with their coefficient, or None for the method's default.
        method: a merge (``methods`` lists them).
        out: folder to create.
        base: the common base; not needed by ``linear`` and ``slerp``.
        settings: of the method; with ``backend="mergekit"``, parameters of mergekit's method of that name.
        data: what ``fisher``, ``regmean``, ``soup`` and ``adamerging`` learn from: local files or folders (see
            ``unmergeable.data``), one for each expert and in their order; for ``soup`` any number.
        config: a mergekit configuration instead of all the above but ``out``.
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
    if backend == "mergekit":
        find_command()
    if config is not None:
        if experts or method is not None or base is not None or settings or data:
            raise UsageError("give either a configuration file, or experts with --method, --base, --set and --data.")
        if backend == "mergekit":
            return _run_config(config, out, seed=seed, checksums=checksums, threads=threads)
        return _merge_config(config, out, checksums=checksums, threads=threads, progress=progress)
    if method is None:
        raise UsageError("name the merge with --method, or give a mergekit configuration file.")
    if method not in MERGES:
        raise UsageError(f"no merge is called {method!r}{nearest(method, MERGES)}")
    if base is not None and not base.exists():
        raise BadInput(
            f"base {base} does not exist; give the folder of the checkpoint the experts were fine-tuned from."
        )
    base_source = None if base is None else open_checkpoint(base)
    sources = [(open_checkpoint(path, base=base), coefficient) for path, coefficient in experts]
    if backend == "mergekit":
        if data:
            raise UsageError("mergekit merges without data; leave out --data, or --backend.")
        return _run_method(
            method,
            base_source,
            sources,
            experts,
            settings or {},
            out,
            base=base,
            seed=seed,
            checksums=checksums,
            threads=threads,
        )
    configured = configure(MERGES[method], settings or {})
    with informed_by_data(configured, base_source, sources, data, out=out, progress=progress) as informed:
        engine.merge(
            base_source,
            [(source, value) for (source, _), value in zip(sources, informed.coefficients, strict=True)],
            informed.method,
            out,
            vary=informed.vary,
            checksums=checksums,
            threads=threads,
            progress=progress,
        )
    coefficients: Sequence[float | None] = configured.resolve(informed.coefficients)
    if informed.vary is not None:
        coefficients = [None] * len(experts)
    used = tuple((str(path), value) for (path, _), value in zip(experts, coefficients, strict=True))
    tensors = len(sources[0][0].names)
    return MergeResult(out, method, settings_of(configured), used, tensors, learnt=informed.learnt)


def _merge_config(config: Path, out: Path, *, checksums: bool, threads: int | None, progress: Progress) -> MergeResult:
    """Merge as a configuration says, with the merges of this package."""
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
        out_dtype=_torch_dtype(parsed),
        checksums=checksums,
        threads=threads,
        progress=progress,
    )
    used = []
    for number, model in enumerate(meaning.experts):
        coefficients = {its.coefficients[number] for its in terms.values()}
        used.append((model, coefficients.pop() if len(coefficients) == 1 else None))
    return MergeResult(out, meaning.method.name, settings_of(meaning.method), tuple(used), len(names))


def _run_config(config: Path, out: Path, *, seed: int, checksums: bool, threads: int | None) -> MergeResult:
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


def _run_method(
    method: str,
    base_source: TensorSource | None,
    sources: Sequence[tuple[TensorSource, float | None]],
    experts: Sequence[tuple[Path, float | None]],
    settings: Mapping[str, object],
    out: Path,
    *,
    base: Path | None,
    seed: int,
    checksums: bool,
    threads: int | None,
) -> MergeResult:
    """Have mergekit merge experts with its method of this name, in float32 and stored as the models are."""
    if method not in MERGEKIT_METHODS:
        raise UsageError(f"mergekit has no {method}; leave out --backend, or use {', '.join(MERGEKIT_METHODS)}.")
    merge: Merge = MERGES[method]()
    coefficients = merge.resolve([coefficient for _, coefficient in experts])
    template = base_source if base_source is not None else sources[0][0]
    paths = [str(path.absolute()) for path, _ in experts]
    document: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": path} for path in paths],
        "parameters": {name: _plain(value) for name, value in settings.items()},
        "dtype": "float32",
        "out_dtype": _stored_dtype(template),
    }
    if method == "slerp":
        document["base_model"] = paths[0]
        document["parameters"].setdefault("t", coefficients[1])
    elif method != "model_stock":
        for model, coefficient in zip(document["models"], coefficients, strict=True):
            model["parameters"] = {"weight": coefficient}
    if base is not None and method not in ("linear", "slerp"):
        document["base_model"] = str(base.absolute())
    parse_config(document)  # refuses parameters that mergekit would pass over in silence
    inputs = {f"expert {number}": source for number, (source, _) in enumerate(sources, start=1)}
    if base_source is not None:
        inputs = {"base": base_source, **inputs}
    merge_with_mergekit(document, inputs, out, seed=seed, checksums=checksums, threads=threads)
    used = tuple((str(path), value) for (path, _), value in zip(experts, coefficients, strict=True))
    return MergeResult(out, method, document["parameters"], used, len(template.names), "mergekit")


def _plain(value: object) -> object:
    """A setting as YAML would read it: command lines give text."""
    import yaml

    return yaml.safe_load(value) if isinstance(value, str) else value


def _torch_dtype(config: MergeConfig) -> torch.dtype | None:
    return None if config.stored_dtype is None else _named_dtype(config.stored_dtype)


def _named_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise BadInput(f"no dtype is called {name!r}; known: bfloat16, float16, float32, float64.")
    return dtype


def _stored_dtype(template: TensorSource) -> str:
    """The floating-point dtype of a checkpoint, which must have one."""
    dtypes = {torch_dtype(template.spec(name).dtype) for name in template.names}
    floats = {str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.is_floating_point}
    if len(floats) != 1:
        raise BadInput(f"{template.description} stores {', '.join(sorted(floats))}: mergekit writes one dtype only.")
    return floats.pop()
