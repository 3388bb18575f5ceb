"""Merge: what a free-rider does with your checkpoint and theirs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmergeable.checkpoint.hub import folder_of
from unmergeable.checkpoint.index import is_adapter
from unmergeable.checkpoint.open import open_checkpoint, split_adapter
from unmergeable.checkpoint.source import TensorSource
from unmergeable.checkpoint.spare import is_output_head
from unmergeable.errors import BadInput, UsageError
from unmergeable.merges import MERGES, engine, merge_method
from unmergeable.merges.learning import learnt_from_data
from unmergeable.merges.mergekit.backend import find_command, merge_with_mergekit
from unmergeable.merges.mergekit.chat_templates import FILE_NAME, chat_template_of, stored_template
from unmergeable.merges.mergekit.config import MergeConfig, parse_config, read_config, read_document
from unmergeable.merges.mergekit.documents import (
    absolute_paths,
    document_of,
    models_named,
    open_model,
    tokenizer_document,
)
from unmergeable.merges.mergekit.meaning import Meaning, meaning_of
from unmergeable.merges.networks import Template
from unmergeable.merges.stacks import Piece, require_one_vocabulary, stacked
from unmergeable.merges.variation import terms_of
from unmergeable.merges.vocabularies import Tokenizer
from unmergeable.ops.adapter_merging import merge_adapters, settings_of_merge
from unmergeable.ops.merge_dtypes import named_dtype, stored_dtype, uniform_dtype
from unmergeable.ops.merge_result import Backend, MergeResult
from unmergeable.progress import Progress, silent
from unmergeable.settings import settings_of

Expert = str | os.PathLike[str] | tuple[str | os.PathLike[str], float | None]
"""A checkpoint, or one with its coefficient."""


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
    dtype: str | None = None,
    template: Template = None,
    tokenizer: Tokenizer | str | int | None = None,
    allow_pickle: bool = False,
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
        dtype: of the merge on disk, ``bfloat16`` say; None for that of each of the template's tensors.
        template: whose configuration, files and parts (heads, towers) the merge has: ``"base"`` or the number of an
            expert. None for the base's (without one, the first expert's), as long as no part of another model is lost.
        tokenizer: whose tokens the merge has: ``"base"``, the number of an expert, or the ``"union"`` of all. None for
            the template's rows. A :class:`Tokenizer` says of single tokens where their rows come from.
        allow_pickle: read models that have no safetensors files.
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
        _refuse_own_choices(template, allow_pickle=allow_pickle)
    out = Path(out)
    if config is not None:
        if experts or method is not None or base is not None or settings or data or dtype or tokenizer is not None:
            raise UsageError(
                "give either a configuration file, or experts with --method, --base, --set, --data, --dtype and "
                "--tokenizer."
            )
        if backend == "mergekit":
            return _merge_config_with_mergekit(Path(config), out, seed=seed, checksums=checksums, threads=threads)
        options = _Options(template, allow_pickle, checksums, threads, progress)
        return _merge_config(Path(config), out, options)
    if method is None:
        raise UsageError("name the merge with --method, or give a mergekit configuration file.")
    MERGES.require(method)
    # A base may be an adapter on a base of its own, as experts may.
    base_folder, under_base = (None, None) if base is None else _folder_and_base(os.fspath(base), None, "base")
    if base_folder is not None and not base_folder.exists():
        raise BadInput(
            f"base {base_folder} does not exist; give the folder of the checkpoint the experts were fine-tuned from."
        )
    of_adapters = base_folder if under_base is None else under_base
    given = [expert if isinstance(expert, tuple) else (expert, None) for expert in experts]
    names = [os.fspath(name) for name, _ in given]
    folders = [_folder_and_base(name, of_adapters) for name in names]
    coefficients: list[float | None] = [coefficient for _, coefficient in given]
    stored = None if dtype is None else named_dtype(dtype)
    tokens = Tokenizer(tokenizer) if isinstance(tokenizer, str | int) else tokenizer
    reads_pickle = allow_pickle if backend == "own" else None
    base_source = None
    if base_folder is not None:
        base_source = open_checkpoint(base_folder, base=under_base, allow_pickle=reads_pickle)
    sources = [open_checkpoint(folder, base=of, allow_pickle=reads_pickle) for folder, of in folders]
    if backend == "mergekit":
        if data:
            raise UsageError("mergekit merges without data; leave out --data, or --backend.")
        resolved = merge_method(method).resolve(coefficients)
        inputs = {} if base_source is None else {"base": base_source}
        inputs |= {f"expert {number}": source for number, source in enumerate(sources, start=1)}
        pairs = list(zip([_named_for_mergekit(*pair) for pair in folders], resolved, strict=True))
        first = next(iter(inputs.values()))
        out_dtype = dtype or stored_dtype(first)
        named_base = None if base_folder is None else _named_for_mergekit(base_folder, under_base)
        document = document_of(method, pairs, named_base, settings or {}, out_dtype=out_dtype)
        if tokens is not None:
            document["tokenizer"] = tokenizer_document(tokens, document)
        merge_with_mergekit(
            document,
            inputs,
            out,
            out_dtype=stored,
            seed=seed,
            checksums=checksums,
            threads=threads,
            tokens_may_differ=tokenizer is not None,
        )
        used = tuple(zip(names, resolved, strict=True))
        return MergeResult(out, method, document["parameters"], used, len(first.names), "mergekit")
    configured = merge_method(method, **(settings or {}))
    weighted = list(zip(sources, coefficients, strict=True))
    data_paths = [Path(path) for path in data]
    with learnt_from_data(configured, base_source, weighted, data_paths, out=out, progress=progress) as learnt:
        manifest = engine.merge(
            base_source,
            list(zip(sources, learnt.coefficients, strict=True)),
            learnt.method,
            out,
            vary=learnt.vary,
            out_dtype=stored,
            template=template,
            tokenizer=tokens,
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
        manifest.details["tensors"],
        learnt=learnt.facts,
        summary=learnt.summary,
        notes=tuple(manifest.details.get("notes", ())),
    )


def _merge_adapters(experts: Sequence[Expert], method: str, settings: Mapping[str, object], out: Path) -> MergeResult:
    given = [expert if isinstance(expert, tuple) else (expert, None) for expert in experts]
    merged, modules = merge_adapters([(folder_of(name), weight) for name, weight in given], method, settings, out)
    used = tuple((os.fspath(name), 1.0 if weight is None else weight) for name, weight in given)
    return MergeResult(out, method, settings_of_merge(merged), used, 2 * modules)


def _folder_and_base(name: str, base: Path | None, role: str = "expert") -> tuple[Path, Path | None]:
    """The folder of a model, and of the base of an adapter: the one named with it, or else the common one."""
    path, adapter = split_adapter(name)
    if adapter is None:
        return folder_of(name), base
    for part in (path, adapter):
        if not part.is_dir():
            raise BadInput(f"{role} {name}: {part} is no folder; download the model and give its folder.")
    return adapter, path


def _named_for_mergekit(folder: Path, base: Path | None) -> Path:
    """mergekit merges an adapter itself, if it is told its base."""
    return folder if base is None or not is_adapter(folder) else Path(f"{base.absolute()}+{folder.absolute()}")


@dataclass(frozen=True)
class _Options:
    """What a configuration file leaves to the command line."""

    template: Template
    allow_pickle: bool
    checksums: bool
    threads: int | None
    progress: Progress


def _merge_config(config: Path, out: Path, options: _Options) -> MergeResult:
    parsed = read_config(config)
    try:
        meaning = meaning_of(parsed)
        sources = _sources(parsed, meaning, config.parent, allow_pickle=options.allow_pickle)
        files = _chat_template(parsed, sources)
        names = _names_of_all(tuple(sources.values()))
        vary = meaning.vary(names)
        # Everything that can be missing is missed before anything is ranked or written.
        terms = terms_of(meaning.method, [None] * len(meaning.experts), names, vary)
    except BadInput as error:
        raise BadInput(f"{config}: {error}") from None
    manifest = engine.merge(
        None if meaning.base is None else sources[meaning.base],
        [(sources[model], None) for model in meaning.experts],
        meaning.method,
        out,
        vary=vary,
        out_dtype=None if parsed.stored_dtype is None else named_dtype(parsed.stored_dtype),
        template=options.template,
        tokenizer=meaning.tokenizer,
        files=files,
        checksums=options.checksums,
        threads=options.threads,
        progress=options.progress,
    )
    used = []
    for number, model in enumerate(meaning.experts):
        coefficients = {tensor_terms.coefficients[number] for tensor_terms in terms.values()}
        used.append((model, coefficients.pop() if len(coefficients) == 1 else None))
    details = manifest.details
    notes = tuple(details.get("notes", ()))
    method = meaning.method
    return MergeResult(out, method.name, settings_of(method), tuple(used), details["tensors"], notes=notes)


def _sources(
    parsed: MergeConfig, meaning: Meaning, folder: Path, *, allow_pickle: bool | None
) -> dict[str, TensorSource]:
    """The models of a merge by their names in its meaning, the template first."""
    named = dict.fromkeys((*filter(None, (parsed.base_model,)), *parsed.models))
    opened = {model: open_model(model, folder, allow_pickle=allow_pickle) for model in named}
    if not meaning.stacks:
        return opened  # The base first: it is the template.
    donor = None if meaning.donor is None else opened[meaning.donor]
    template = meaning.base or meaning.experts[0]
    sources = {}
    for name in dict.fromkeys((template, *meaning.experts)):
        parts = meaning.stacks[name]
        pieces = [Piece(opened[part.model], part.first, part.stop) for part in parts]
        if parsed.tokenizer is not None:
            require_one_vocabulary([piece.source for piece in pieces])
        sources[name] = stacked(pieces, donor if name == template else None)
    return sources


def _chat_template(parsed: MergeConfig, sources: Mapping[str, TensorSource]) -> dict[str, bytes]:
    """The file of the chat template that a configuration asks for, where it is another than the template model's."""
    if parsed.chat_template is None:
        return {}
    template = next(iter(sources.values()))
    wanted = chat_template_of(parsed.chat_template, sources.values())
    if wanted is None or wanted == stored_template(template):
        return {}
    return {FILE_NAME: wanted.encode()}


def _names_of_all(sources: Sequence[TensorSource]) -> tuple[str, ...]:
    """The template's tensors, and the output heads that others may have beside them."""
    names = dict.fromkeys(sources[0].names)
    names |= {name: None for source in sources[1:] for name in source.names if is_output_head(name)}
    return tuple(names)


def _refuse_own_choices(template: Template, *, allow_pickle: bool) -> None:
    if template is not None:
        raise UsageError("mergekit takes configuration and heads of its base; leave out --template, or --backend.")
    if allow_pickle:
        raise UsageError(
            "mergekit reads pickles by itself, but here nothing is compared with them; leave out --backend."
        )


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
    template = _template_of(document, config.parent) or next(iter(roles.values()))
    dtype = document.get("out_dtype") or document.get("dtype") or uniform_dtype(template)
    merge_with_mergekit(
        absolute_paths({**document, "out_dtype": str(dtype)} if dtype else document, config.parent),
        {"base" if role == base else f"model {number}": source for number, (role, source) in enumerate(roles.items())},
        out,
        out_dtype=None if dtype is None else named_dtype(str(dtype)),
        template=template,
        tokens_may_differ=bool(document.get("tokenizer") or document.get("tokenizer_source")),
        seed=seed,
        checksums=checksums,
        threads=threads,
    )
    parameters = document.get("parameters") or {}
    listed = tuple((model, None) for model in models if model != base)
    return MergeResult(out, str(document.get("merge_method")), parameters, listed, len(template.names), "mergekit")


def _template_of(document: Mapping[str, Any], folder: Path) -> TensorSource | None:
    """What tensors the merge of a configuration has; None where that cannot be told here."""
    try:
        parsed = parse_config(document)
        return next(iter(_sources(parsed, meaning_of(parsed), folder, allow_pickle=None).values()))
    except BadInput:
        return None
