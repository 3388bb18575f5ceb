"""Streams N checkpoints into one, or merges N state dicts in memory, with the same functions.

The base is the template for configuration, tokenizer, shards and tensor order; without a base the first expert is.
Everything that can be refused is refused before the first byte is written.
"""

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, Protocol, cast, get_type_hints

import torch
from torch import Tensor

from unmergeable.checkpoint.dtypes import dtype_code
from unmergeable.checkpoint.header import TensorSpec
from unmergeable.checkpoint.manifest import Manifest
from unmergeable.checkpoint.partial import require_absent
from unmergeable.checkpoint.rewrite import OutputTensor, output_like, rewrite
from unmergeable.checkpoint.source import TensorSource
from unmergeable.checkpoint.writer import require_spec
from unmergeable.errors import UsageError
from unmergeable.merges.base import Inputs, Merge, TensorMerge
from unmergeable.merges.blocks import Scratch
from unmergeable.merges.models import (
    Model,
    mergeable_names,
    require_nothing_lost,
    require_same_architecture,
    source_model,
    state_dict_model,
)
from unmergeable.merges.variation import Vary, describe, terms_of
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
        out_dtype: The floating-point dtype of the merge; None for that of the models.
        checksums: Record the SHA-256 of every file read and written. A merge is no release, and hashing takes longer
            than merging; without, the manifest has sizes and the hashes of headers.
        threads: Tensors merged at a time; None for one per processor.
        memory_budget: Bytes of merged tensors held between merging and writing.
        progress: Told of the bytes ranked (by methods that rank) and written.

    Raises:
        UsageError: for settings, coefficients or a number of experts that the method cannot use.
        Mismatch: naming what differs between the models: a tensor's name, shape or dtype, or the architecture.
        BadInput: naming the first tensor whose merge is not finite; or when ``out`` exists.
        CheckpointError: when a file cannot be read or written.
    """
    coefficients = [coefficient for _, coefficient in experts]
    _require_usable(method, coefficients, has_base=base is not None)
    require_absent(Path(out))  # also refused later, but ranking task vectors takes its time
    sources = {f"expert {number}": source for number, (source, _) in enumerate(experts, start=1)}
    if base is not None:
        sources = {"base": base, **sources}
    template, *others = sources.values()
    for other in others:
        require_same_architecture(template, other)
    models = [source_model(f"{role} ({source.description})", source) for role, source in sources.items()]
    inputs = _inputs(models, method, has_base=base is not None)
    terms = terms_of(method, coefficients, inputs.names, vary)
    recipe: dict[str, Any] = {
        "merge": method.name,
        "settings": asdict(method),
        "coefficients": list(method.resolve(coefficients)),
    }
    if vary is not None:
        recipe["varied"] = describe(terms)
    changes = None if out_dtype is None else dtype_changes(template.config, out_dtype)

    # Each tensor has one thread to itself, and the processors are shared among tensors.
    with one_thread_per_kernel():
        workers = worker_threads(threads)
        merge_tensor = method.prepare(replace(inputs, threads=workers, progress=progress), terms.__getitem__)
        return rewrite(
            template,
            out,
            _plan(template, inputs, merge_tensor, out_dtype),
            manifest={"recipe": recipe},
            resume_token=json.dumps(recipe),
            config_changes=changes,
            verify=partial(_verify, template, out_dtype),
            also_read={role: source for role, source in sources.items() if source is not template},
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
        Mismatch: naming the first tensor that is not in every model with one shape and dtype.
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
    inputs = replace(_inputs(models, method, has_base=base is not None), statistics=gathered)

    terms = terms_of(method, given, inputs.names, vary)
    merge_tensor, scratch, merged = method.prepare(inputs, terms.__getitem__), Scratch(out_dtype), set(inputs.names)
    return {
        name: merge_tensor(name, inputs.operands(name), scratch) if name in merged else tensor.clone()
        for name, tensor in template.items()
    }


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


def dtype_changes(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What a ``config.json`` has to say differently when the weights are stored as ``dtype``."""
    name = str(dtype).removeprefix("torch.")
    changes = _renamed_dtypes(config, name)
    return changes if {"dtype", "torch_dtype"} & changes.keys() else {**changes, "dtype": name}


def _renamed_dtypes(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The entries that name a dtype, also in the configurations of parts (``text_config``)."""
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            changes[key] = name
        elif isinstance(value, Mapping) and (inner := _renamed_dtypes(value, name)):
            changes[key] = inner
    return changes


def _require_usable(method: Merge, coefficients: Sequence[float | None], *, has_base: bool) -> None:
    """Check all that can be checked without the models."""
    method.validate()
    if method.needs_base and not has_base:
        raise UsageError(f"{method.name} merges task vectors: name the base that the experts were tuned from.")
    count = len(coefficients)
    if count < method.fewest_experts:
        raise UsageError(f"{method.name}: {count} experts given, at least {method.fewest_experts} needed.")
    if method.most_experts is not None and count > method.most_experts:
        raise UsageError(f"{method.name}: {count} experts given, at most {method.most_experts} can be merged.")
    method.resolve(coefficients)


def _inputs(models: Sequence[Model], method: Merge, *, has_base: bool) -> Inputs:
    """What the method reads, after checking that all models, even a base it does not read, belong together."""
    names = mergeable_names(models)
    read = models[1:] if has_base and not method.needs_base else models
    return Inputs(names=names, operands=lambda name: tuple(model[name] for model in read))


def _plan(
    template: TensorSource, inputs: Inputs, merge_tensor: TensorMerge, out_dtype: torch.dtype | None
) -> list[OutputTensor]:
    scratch, merged = Scratch(out_dtype), set(inputs.names)

    def planned(tensor: OutputTensor) -> OutputTensor:
        if tensor.name not in merged:
            return tensor
        spec = tensor.spec if out_dtype is None else replace(tensor.spec, dtype=dtype_code(out_dtype))
        merge_operands = partial(merge_tensor, tensor.name, inputs.operands(tensor.name), scratch)
        return replace(tensor, spec=spec, fill=partial(_fill, tensor.name, spec, merge_operands, scratch))

    return [planned(tensor) for tensor in output_like(template, {})]


def _fill(name: str, spec: TensorSpec, merge_operands: Callable[[], Tensor], scratch: Scratch, out: Tensor) -> None:
    with scratch.into(out):
        merged = merge_operands()
    require_spec(name, merged, spec)
    if merged.data_ptr() != out.data_ptr():  # the method used memory of its own
        out.copy_(merged)


def _verify(template: TensorSource, out_dtype: torch.dtype | None, written: TensorSource) -> Mapping[str, Any]:
    require_nothing_lost(template, written, out_dtype)
    return {}
