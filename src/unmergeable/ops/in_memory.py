"""Exact protections without files: the arithmetic of ``protect`` and ``restore`` on a state dict, or a live network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.memory import MemorySource, written_in_memory
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import KeyFileError, UsageError
from unmergeable.gauge.key import Key
from unmergeable.network.disk_weights import Weights, weights_of
from unmergeable.ops.opened import architecture_of, base_of
from unmergeable.ops.steps import Methods, steps_of
from unmergeable.progress import Progress, silent
from unmergeable.protections import PROTECTIONS, Inputs, Rewrite
from unmergeable.protections.exact import ExactSequence
from unmergeable.threads import one_thread_per_kernel, worker_threads


class Protected(NamedTuple):
    """The protected tensors by their names on disk, and the key that gives the original back."""

    state: dict[str, Tensor]
    key: Key


@one_thread_per_kernel()
def protect_state_dict(
    state: Weights,
    config: Any = None,
    *,
    method: Methods = None,
    settings: Mapping[str, object] | None = None,
    base: Weights | None = None,
    seed: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Protected:
    """Protect tensors in memory: a secret change of basis that the network cannot see.

        protected, key = protect_state_dict(network.state_dict(), network.config)

    The same secret gives the same bits as ``protect`` with files, and the result passes the same check, block by block.
    Tensors that no method changes are shared with ``state``, not copied; ``state`` itself is never changed. With
    ``untie`` the result holds ``lm_head.weight`` besides: set ``tie_word_embeddings`` to False in its config.

    Args:
        state: tensors by the names that the checkpoint's files use, or a live network (of which each weight counts
            once, however many modules share it).
        config: of the network: a mapping, or anything with ``to_dict()``; None for that of a live network.
        method, settings: as of :func:`unmergeable.protect`; exact methods only.
        base: what it was fine-tuned from, for methods that look at it (``params``).
        seed: draws the key from a public number instead of the operating system: for experiments only.
        threads: how many tensors are checked at a time; None for one per processor.

    Returns:
        The protected tensors, in the order and dtypes of ``state``, and the key; it unpacks into these two. Nothing
        else opens the result: :func:`unmergeable.gauge.key.write_key` keeps the key in a file.

    Raises:
        UsageError: a method without a key, which works on files (``unmergeable.protect``); a base is missing.
        UnsupportedArchitecture: the network's symmetries are not known.
        NotEquivalent: the result does not compute what the original computes.
    """
    (step, *others) = steps_of(method, settings or {})
    if others or not isinstance(step.protection, ExactSequence):
        keyless = next(part for part in (step, *others) if not part.has_key)
        raise UsageError(f"{keyless.name} has no key and works on files: use unmergeable.protect.")
    if base is None and "base" in step.requirements.needs:
        raise UsageError(f"{step.name} looks at the base: give the tensors of what this model was fine-tuned from.")
    expert, architecture = _source(state, config)
    origin: TensorSource = expert
    if base is not None:
        origin = base_of(MemorySource(weights_of(base), expert.config, expert.folder), expert, architecture)
    prepared = step.protection.prepare(
        Inputs(
            expert,
            origin,
            architecture,
            template=expert.folder,
            base_folder=expert.folder,
            seed=seed,
            threads=worker_threads(threads),
            progress=progress,
        )
    )
    assert prepared.key is not None
    return Protected(_checked(expert, prepared), prepared.key)


@one_thread_per_kernel()
def restore_state_dict(
    state: Weights, config: Any, key: Key, *, threads: int | None = None, progress: Progress = silent
) -> dict[str, Tensor]:
    """Undo :func:`protect_state_dict`, up to rounding; tensors that were not changed are shared with ``state``.

    ``state`` and ``config`` as there; of a live network ``config`` may be None.

    Nothing in the tensors says which key they belong to: another key of the same methods gives another network of the
    same function, which is not the original.

    Raises:
        KeyFileError: the key belongs to another family of networks.
        NotEquivalent: the result does not compute what ``state`` computes.
    """
    protected, architecture = _source(state, config)
    family = key.recipe["architecture"]
    if family != architecture.family:
        raise KeyFileError(f"the key was made for a {family} network, and this is a {architecture.family} one.")
    methods = ExactSequence.from_recipe(key.recipe, PROTECTIONS)
    prepared = methods.restore(protected, architecture, key, threads=worker_threads(threads), progress=progress)
    return _checked(protected, prepared)


def _checked(source: MemorySource, prepared: Rewrite) -> dict[str, Tensor]:
    """What was prepared, verified as a written file is."""
    result = written_in_memory(source, prepared.plan)
    assert prepared.verify is not None
    prepared.verify(replace(source, tensors=result, config={**source.config, **(prepared.config_changes or {})}))
    return result


def _source(state: Weights, config: Any) -> tuple[MemorySource, Architecture]:
    if config is None and isinstance(state, torch.nn.Module):
        config = state.config
    if config is None:
        raise UsageError("a state dict does not say what network it is of: give its config.")
    source = MemorySource(weights_of(state), config if isinstance(config, Mapping) else config.to_dict())
    return source, architecture_of(source)
