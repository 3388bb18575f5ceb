"""Streams N checkpoints into one, or merges N state dicts in memory, with the same functions.

The base is the template for configuration, tokenizer, shards and tensor order; without a base the first expert is.
Everything that can be refused is refused before the first byte is written.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmergeable.checkpoint.manifest import Manifest
from unmergeable.checkpoint.partial import require_absent
from unmergeable.checkpoint.pipeline import default_threads
from unmergeable.checkpoint.rewrite import MEMORY_BUDGET, OutputTensor, output_like, rewrite
from unmergeable.checkpoint.source import TensorSource, require_same_tensors
from unmergeable.errors import UsageError
from unmergeable.merges.blocks import Scratch
from unmergeable.merges.method import Inputs, Merge, TensorMerge
from unmergeable.merges.models import Model, mergeable_names, require_same_architecture, source_model, state_dict_model
from unmergeable.progress import Progress, silent


def merge(
    base: TensorSource | None,
    experts: Sequence[tuple[TensorSource, float | None]],
    method: Merge,
    out: Path | str,
    *,
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
        threads: Tensors merged at a time; None for one per processor.
        memory_budget: Bytes of merged tensors held between merging and writing.
        progress: Told of the bytes ranked (by methods that rank) and written.

    Raises:
        UsageError: for settings, coefficients or a number of experts that the method cannot use.
        Mismatch: naming what differs between the models: a tensor's name, shape or dtype, or the architecture.
        BadInput: naming the first tensor whose merge is not finite; or when ``out`` exists.
        CheckpointError: when a file cannot be read or written.
    """
    weights = _resolve(method, [coefficient for _, coefficient in experts], has_base=base is not None)
    require_absent(Path(out))  # also refused later, but ranking task vectors takes its time
    sources = {f"expert {number}": source for number, (source, _) in enumerate(experts, start=1)}
    if base is not None:
        sources = {"base": base, **sources}
    template, *others = sources.values()
    for other in others:
        require_same_architecture(template, other)
    models = [source_model(f"{role} ({source.description})", source) for role, source in sources.items()]
    inputs = _inputs(models, method, has_base=base is not None)

    # Each tensor has one thread to itself, and the processors are shared among tensors.
    with _torch_threads(1):
        workers = threads or default_threads()
        merge_tensor = method.prepare(replace(inputs, threads=workers, progress=progress), weights)
        return rewrite(
            template,
            out,
            _plan(template, inputs, merge_tensor),
            manifest={"recipe": _recipe(method, weights)},
            resume_token=json.dumps(_recipe(method, weights)),
            verify=partial(_require_complete, template),
            also_read={role: source for role, source in sources.items() if source is not template},
            threads=workers,
            memory_budget=memory_budget,
            progress=progress,
        )


def merge_state_dicts(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    coefficients: Sequence[float | None] | None,
    method: Merge,
) -> dict[str, Tensor]:
    """Merge state dicts in memory: new tensors of the stored dtypes, in the order of the base or first expert.

    Args:
        base: The common ancestor; may be None where the method does not need it.
        experts: At least ``method.fewest_experts`` fine-tunes of it.
        coefficients: One per expert, None for the method's default; or None for the default throughout.
        method: A merge with its settings, e.g. ``TaskArithmetic(scaling_coefficient=0.3)``.

    Raises:
        UsageError: for settings, coefficients or a number of experts that the method cannot use.
        Mismatch: naming the first tensor that is not in every model with one shape and dtype.
        BadInput: naming the first tensor whose merge is not finite.
    """
    given = [None] * len(experts) if coefficients is None else coefficients
    if len(given) != len(experts):
        raise UsageError(f"{len(given)} coefficients for {len(experts)} experts: give one each, or none at all.")
    weights = _resolve(method, given, has_base=base is not None)
    states = {f"expert {number}": state for number, state in enumerate(experts, start=1)}
    if base is not None:
        states = {"base": base, **states}
    template = next(iter(states.values()))
    models = [state_dict_model(label, state) for label, state in states.items()]
    inputs = _inputs(models, method, has_base=base is not None)

    merge_tensor, scratch, merged = method.prepare(inputs, weights), Scratch(), set(inputs.names)
    return {
        name: merge_tensor(name, inputs.operands(name), scratch) if name in merged else tensor.clone()
        for name, tensor in template.items()
    }


def _resolve(method: Merge, coefficients: Sequence[float | None], *, has_base: bool) -> tuple[float, ...]:
    """The method's coefficients, after checking all that can be checked without the models."""
    method.validate()
    if method.needs_base and not has_base:
        raise UsageError(f"{method.name} merges task vectors: name the base that the experts were tuned from.")
    if len(coefficients) < method.fewest_experts:
        raise UsageError(f"{method.name}: {len(coefficients)} experts given, at least {method.fewest_experts} needed.")
    return method.resolve(coefficients)


def _inputs(models: Sequence[Model], method: Merge, *, has_base: bool) -> Inputs:
    """What the method reads, after checking that all models, even a base it does not read, belong together."""
    names = mergeable_names(models)
    read = models[1:] if has_base and not method.needs_base else models
    return Inputs(names=names, operands=lambda name: tuple(model[name] for model in read))


def _plan(template: TensorSource, inputs: Inputs, merge_tensor: TensorMerge) -> list[OutputTensor]:
    """The template's tensors in order: the floating-point ones merged, the others copied."""
    scratch, merged = Scratch(), set(inputs.names)
    return [
        replace(tensor, make=partial(merge_tensor, tensor.name, inputs.operands(tensor.name), scratch))
        if tensor.name in merged
        else tensor
        for tensor in output_like(template, {})
    ]


def _recipe(method: Merge, coefficients: Sequence[float]) -> dict[str, Any]:
    return {"merge": method.name, "settings": asdict(method), "coefficients": list(coefficients)}


def _require_complete(template: TensorSource, written: TensorSource) -> Mapping[str, Any]:
    require_same_tensors(template, written, "template and merge", dtypes=True)
    return {}


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
