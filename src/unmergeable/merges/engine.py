"""Streams N checkpoints into one, or merges N state dicts in memory, with the same functions.

The base is the template for configuration, tokenizer, shards and tensor order; without a base the first expert is.
Everything that can be refused is refused before the first byte is written.
"""

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, Protocol, cast, get_type_hints

import torch
from torch import Tensor

from unmergeable.checkpoint.header import TensorSpec
from unmergeable.checkpoint.manifest import Manifest
from unmergeable.checkpoint.partial import require_absent
from unmergeable.checkpoint.rewrite import rewrite
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import UsageError
from unmergeable.merges.base import Inputs, Merge
from unmergeable.merges.blocks import Scratch, in_one_dtype
from unmergeable.merges.comparison import compare
from unmergeable.merges.models import mergeable_names, require_nothing_lost, state_dict_model
from unmergeable.merges.modules import merged_modules
from unmergeable.merges.networks import Template
from unmergeable.merges.plan import config_changes, fill, plan
from unmergeable.merges.variation import Vary, describe, terms_of
from unmergeable.merges.vocabularies import Tokenizer
from unmergeable.network.disk_weights import Weights, weights_of
from unmergeable.progress import Progress, silent
from unmergeable.settings import configure
from unmergeable.threads import one_thread_per_kernel, worker_threads

MEMORY_BUDGET = 256 << 20
"""Bytes of merged tensors on their way to the disk. A merge is slower than the disk: more would only wait."""

Settings = ParamSpec("Settings")


def merge(
    base: TensorSource | None,
    experts: Sequence[tuple[TensorSource, float | None]],
    method: Merge,
    out: Path | str,
    *,
    vary: Vary | None = None,
    out_dtype: torch.dtype | None = None,
    template: Template = None,
    tokenizer: Tokenizer | None = None,
    files: Mapping[str, bytes] | None = None,
    checksums: bool = False,
    threads: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress = silent,
) -> Manifest:
    """Merge checkpoints into a new folder ``out``, which appears complete or not at all.

    The models are read block by block: memory holds merged tensors on their way to the disk, never a model. The
    written bytes depend neither on ``threads`` nor on how the inputs are cut into shards.

    Args:
        base: The common ancestor; may be None where the method does not need it.
        experts: Fine-tunes of it, each with its coefficient, or None for the method's default.
        method: A merge with its settings, e.g. ``TaskArithmetic(scaling_coefficient=0.3)``.
        out: The folder to create.
        vary: What departs from the coefficients and settings in a tensor, by its name; None where nothing does.
        out_dtype: The floating-point dtype of the merge; None for that of each of the template's tensors.
        template: Whose configuration, files and parts (heads, towers) the merge has: ``"base"`` or the number of an
            expert. By default the base's, without one the first expert's, as long as no part of another is lost.
        tokenizer: Which tokens the merge has; by default the template's.
        files: Further small files of the merge, in the place of the template's.
        checksums: Record the SHA-256 of every file read and written. A merge is no release, and hashing takes longer
            than merging; without, the manifest has sizes and the hashes of headers.
        threads: Tensors merged at a time; None for one per processor.
        memory_budget: Bytes of merged tensors held between merging and writing.
        progress: Told of the bytes ranked (by methods that rank) and written.

    Raises:
        UsageError: for settings, coefficients or a number of experts that the method cannot use.
        Mismatch: naming what differs between the models and cannot be merged: a tensor, or the architecture.
        BadInput: naming the first tensor whose merge is not finite; or when ``out`` exists.
        CheckpointError: when a file cannot be read or written.
    """
    coefficients = [coefficient for _, coefficient in experts]
    _require_usable(method, coefficients, has_base=base is not None)
    require_absent(Path(out))  # also refused later, but ranking task vectors takes its time
    sources = {f"expert {number}": source for number, (source, _) in enumerate(experts, start=1)}
    if base is not None:
        sources = {"base": base, **sources}
    reads_base = base is not None and method.needs_base
    networks = compare(
        base, [source for source, _ in experts], reads_base=reads_base, template=template, tokenizer=tokenizer
    )
    inputs = Inputs(names=networks.names, operands=networks.operands)
    terms = terms_of(method, coefficients, inputs.names, vary)
    recipe: dict[str, Any] = {
        "merge": method.name,
        "settings": asdict(method),
        "coefficients": list(method.resolve(coefficients)),
    }
    if vary is not None:
        recipe["varied"] = describe(terms)
    beside = merged_modules(
        networks.owner,
        networks.read,
        None if vary is not None else _merge_of_layers(method, coefficients, reads_base=reads_base),
        networks.notes,
    )
    recipe |= {} if template is None else {"template": template}
    recipe |= {} if tokenizer is None else {"tokenizer": asdict(tokenizer)}
    details = {"recipe": recipe, **({"notes": networks.notes} if networks.notes else {})}

    # Each tensor has one thread to itself, and the processors are shared among tensors.
    with one_thread_per_kernel():
        workers = worker_threads(threads)
        merge_tensor = method.prepare(replace(inputs, threads=workers, progress=progress), terms.__getitem__)
        planned = plan(networks, merge_tensor, out_dtype)
        return rewrite(
            networks.template,
            out,
            planned,
            manifest={**details, "tensors": len(planned)},
            resume_token=json.dumps(recipe),
            config_changes=config_changes(networks, out_dtype),
            side_files={**networks.vocabularies.files, **beside, **(files or {})},
            verify=partial(_verify, {tensor.name: tensor.spec for tensor in planned}),
            also_read={role: source for role, source in sources.items() if source is not networks.template},
            checksums=checksums,
            threads=workers,
            memory_budget=memory_budget,
            progress=progress,
        )


def merge_state_dicts(
    base: Weights | None,
    experts: Sequence[Weights],
    *,
    method: Merge,
    coefficients: Sequence[float | None] | None = None,
    vary: Vary | None = None,
    statistics: Sequence[Mapping[str, Tensor]] = (),
    out_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Merge in memory: new tensors of the stored dtypes, in the order of the base or first expert.

    The bits are those that :func:`merge` writes. Models are state dicts by the names on disk, or live networks, whose
    parameters are read without a copy.

    Args:
        base: The common ancestor; may be None where the method does not need it.
        experts: At least ``method.fewest_experts`` fine-tunes of it.
        method: A merge with its settings, e.g. ``TaskArithmetic(scaling_coefficient=0.3)``.
        coefficients: One per expert, None for the method's default; or None for the default throughout.
        vary: What departs from the coefficients and settings in a tensor, by its name; None where nothing does.
        statistics: What was gathered of each expert, for methods that read statistics.
        out_dtype: The floating-point dtype of the merge; None for that of the models.

    Raises:
        UsageError: for settings, coefficients or a number of experts that the method cannot use.
        Mismatch: naming the first tensor that is not in every model with one shape.
        BadInput: naming the first tensor whose merge is not finite.
    """
    given = [None] * len(experts) if coefficients is None else coefficients
    if len(given) != len(experts):
        raise UsageError(f"{len(given)} coefficients for {len(experts)} experts: give one each, or none at all.")
    _require_usable(method, given, has_base=base is not None)
    if statistics and "statistics" not in method.requirements().reads:
        raise UsageError(f"{method.name} reads no statistics; leave them out.")
    if statistics and len(statistics) != len(experts):
        raise UsageError(f"statistics of {len(statistics)} models for {len(experts)} experts: give those of each.")
    states = {f"expert {number}": weights_of(expert) for number, expert in enumerate(experts, start=1)}
    if base is not None:
        states = {"base": weights_of(base), **states}
    template = next(iter(states.values()))
    models = [state_dict_model(label, state) for label, state in states.items()]
    gathered = tuple(state_dict_model(f"statistics {n}", state) for n, state in enumerate(statistics, start=1))
    read = models[1:] if base is not None and not method.needs_base else models
    inputs = Inputs(
        names=mergeable_names(models),  # even a base that is not read has to belong to them
        operands=lambda name: in_one_dtype([model[name] for model in read]),
        statistics=gathered,
    )
    terms = terms_of(method, given, inputs.names, vary)
    scratch, merged = Scratch(), set(inputs.names)

    def merged_one(name: str) -> Tensor:
        like = template[name].detach()
        if name not in merged:
            return like.clone()
        out = torch.empty_like(like, dtype=out_dtype or like.dtype, memory_format=torch.contiguous_format)
        fill(name, partial(merge_tensor, name, inputs.operands(name), scratch), scratch, out)
        return out

    # As for files: the bits of a sum, or of singular values, depend on how many threads a kernel has.
    with one_thread_per_kernel():
        merge_tensor = method.prepare(inputs, terms.__getitem__)
        with ThreadPoolExecutor(worker_threads(None)) as pool:
            return dict(zip(template, pool.map(merged_one, template), strict=True))


class MergeFunction(Protocol[Settings]):
    """A merge of state dicts or live networks, whose further keywords are the settings of the method."""

    def __call__(
        self,
        base: Weights | None,
        experts: Sequence[Weights],
        coefficients: Sequence[float | None] | None = None,
        *values: Settings.args,
        **settings: Settings.kwargs,
    ) -> dict[str, Tensor]: ...


def in_memory(method: Callable[Settings, Merge]) -> MergeFunction[Settings]:
    """The function of state dicts that a method has under its own name."""
    cls = cast(type[Merge], method)

    def function(
        base: Weights | None,
        experts: Sequence[Weights],
        *,
        coefficients: Sequence[float | None] | None = None,
        **settings: Any,
    ) -> dict[str, Tensor]:
        return merge_state_dicts(base, experts, method=configure(cls, settings), coefficients=coefficients)

    hints, signature = get_type_hints(cls), inspect.signature(function)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "settings"]
    parameters += [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=hints[item.name])
        for item in fields(cls)
    ]
    described = vars(function)
    described["__signature__"] = signature.replace(parameters=parameters)
    function.__annotations__ = {item.name: item.annotation for item in parameters} | {"return": dict[str, Tensor]}
    function.__name__ = function.__qualname__ = cls.name
    function.__module__ = cls.__module__
    function.__doc__ = (
        f"{(sys.modules[cls.__module__].__doc__ or cls.name).splitlines()[0]}\n\n"
        f"Settings are those of :class:`{cls.__name__}`; the rest is as for "
        ":func:`~unmergeable.merges.merge_state_dicts`."
    )
    return cast(MergeFunction[Settings], function)


def _require_usable(method: Merge, coefficients: Sequence[float | None], *, has_base: bool) -> None:
    """Check all that can be checked without the models."""
    method.validate()
    if method.needs_base and not has_base:
        raise UsageError(f"{method.name} merges task vectors: name the base that the experts were tuned from.")
    method.require_count(len(coefficients))
    method.resolve(coefficients)


def _merge_of_layers(
    method: Merge, coefficients: Sequence[float | None], *, reads_base: bool
) -> Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]] | None:
    """The same merge for layers beside the networks; None where it goes by what was learnt of the networks."""
    if {"data", "statistics"} & set(method.requirements().reads):
        return None

    def merge(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        base, experts = (states[0], states[1:]) if reads_base else (None, states)
        return merge_state_dicts(base, experts, method=method, coefficients=coefficients)

    return merge


def _verify(expected: Mapping[str, TensorSpec], written: TensorSource) -> Mapping[str, Any]:
    require_nothing_lost(expected, written)
    return {}
