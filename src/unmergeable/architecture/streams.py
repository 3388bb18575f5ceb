"""The words a family's residual stream is written in, and the check that nothing along it was forgotten."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import (
    Attention,
    FeedForward,
    Mixture,
    SharedHeads,
    memory_readers,
    mixture_readers,
    output_bias,
    stream_readers,
)
from unmergeable.architecture.declare import Config, Names, setting
from unmergeable.architecture.residual import Norm, Residual, Rows, StreamAxis
from unmergeable.architecture.symmetry import Variance

HEADS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs")
"""Modules that may read the last norm of a language model."""

ASIDE = (
    r"(lm_head|embed_out|score|classifier|qa_outputs)\.bias",
    r".*rotary_emb\.inv_freq",
    r".*\.(attn|attention)\.(bias|masked_bias)",
    r".*\.position_ids",
)
"""Tensors that lie beside every stream: biases of logits, buffers."""

EXPOSED = "the stream is what this network gives out: whatever reads it is not in the checkpoint"

FUSED = "the experts are stored as one tensor, in which hidden units lie along two axes"


def writes(names: Names, *tensors: str, axis: int = -1) -> list[StreamAxis]:
    """Those of ``tensors`` that are stored, as writers along ``axis`` (the last for embeddings)."""
    return [_axis(names, tensor, axis, "vector") for tensor in tensors if tensor in names]


def linear(names: Names, module: str) -> list[StreamAxis]:
    """A linear map or convolution whose output is the stream: the rows of its weight, and its bias."""
    return writes(names, f"{module}.weight", f"{module}.bias", axis=0)


def reads(names: Names, *tensors: str, copies: int = 1) -> list[StreamAxis]:
    """Those of ``tensors`` that are stored, as readers along the axis of their inputs."""
    return [StreamAxis(tensor, 1, "covector", copies) for tensor in tensors if tensor in names]


def scales(names: Names, *tensors: str) -> list[StreamAxis]:
    """Those of ``tensors`` that are stored, as elementwise gains on the stream."""
    return [StreamAxis(tensor, 0, "gain") for tensor in tensors if tensor in names]


def _axis(names: Names, tensor: str, axis: int, variance: Variance) -> StreamAxis:
    return StreamAxis(tensor, axis % len(names.shapes[tensor]), variance)


def norm(names: Names, module: str, readers: Iterable[StreamAxis] = (), offset: float = 0.0, then: str = "") -> Norm:
    """The norm ``module``; ``readers`` are all that see its output, none where its output is the stream.

    ``then`` as in :class:`Norm`. Files converted from TensorFlow call weight and bias gamma and beta.
    """
    is_old = f"{module}.gamma" in names
    gain, bias = (f"{module}.gamma", f"{module}.beta") if is_old else (f"{module}.weight", f"{module}.bias")
    return Norm(gain, names.optional(bias), tuple(dict.fromkeys(readers)), offset, then)


def readers_in(
    blocks: Iterable[Attention | FeedForward], modules: Sequence[str], mixtures: Iterable[Mixture] = ()
) -> list[StreamAxis]:
    """All through which the blocks of ``modules`` read the stream: one block by its name, or all inside a module."""
    blocks = tuple(blocks)
    exact = {block.name for block in blocks}

    def is_in(name: str) -> bool:
        return any(name == module or (module not in exact and name.startswith(f"{module}.")) for module in modules)

    found = [axis for block in blocks if is_in(block.name) for axis in stream_readers(block)]
    return found + [axis for mixture in mixtures if is_in(mixture.name) for axis in mixture_readers(mixture)]


def residual(
    names: Names,
    name: str,
    size: int,
    kind: Literal["rms", "layer"],
    *,
    embeddings: Sequence[StreamAxis],
    blocks: Iterable[Attention | FeedForward],
    norms: Sequence[Norm],
    mixtures: Iterable[Mixture] = (),
    others: Iterable[StreamAxis] = (),
    tied: str | None = None,
    layer_scales: Mapping[str, str] | None = None,
    is_exposed: bool = False,
    is_normed_out: bool = False,
    sums: Iterable[Sequence[Rows]] = (),
) -> Residual:
    """A stream with its ``blocks``: what they read and write, what the norms' readers read, and ``others``.

    Of ``sums`` those rows count that are stored.
    """
    blocks = tuple(blocks)
    axes = [*embeddings, *others]
    for block in blocks:
        down = block.output if isinstance(block, Attention) else block.down
        axes += [*stream_readers(block), StreamAxis(down.weight, 1 - down.axis, "vector")]
        axes += writes(names, output_bias(block))
    for mixture in mixtures:
        axes += mixture_readers(mixture)
        axes += [StreamAxis(mixture.fused.down, 1, "vector")] if mixture.fused else []
    axes += [reader for item in norms for reader in item.readers]
    axes += scales(names, *(layer_scales or {}))
    every = tuple(dict.fromkeys(axes))
    stored = (tuple(rows for rows in members if rows.tensor in names) for members in sums)
    added = tuple(members for members in stored if len(members) > 1)
    return Residual(name, size, kind, every, tuple(norms), tied, layer_scales or {}, is_exposed, is_normed_out, added)


def with_residuals(
    names: Names,
    family: str,
    blocks: Sequence[Attention | FeedForward],
    untouched: tuple[str, ...],
    residuals: Sequence[Residual],
    *,
    mixtures: tuple[Mixture, ...] = (),
    shared_heads: tuple[SharedHeads, ...] = (),
    aside: Iterable[str] = (),
    missing: Mapping[str, str] | None = None,
) -> Architecture:
    """The architecture with its streams, or without them where a stored tensor may lie along one unnoticed.

    ``aside``: patterns of tensors known to lie beside every stream. ``missing``: streams left out, and why.
    """
    exposed = tuple(item for item in residuals if item.is_exposed and all(norm.gain in names for norm in item.norms))
    residuals = tuple(item for item in residuals if not item.is_exposed)
    reasons = dict(missing or {}) | {f"{item.name}.experts.order": FUSED for item in mixtures if item.fused}
    absent = next((item.gain for stream in residuals for item in stream.norms if item.gain not in names), None)
    if absent is not None:
        reasons["residual"] = f"tensor {absent} is missing: a norm without a gain, or an incomplete checkpoint"
        residuals = ()
    architecture = Architecture(
        family, tuple(blocks), untouched, shared_heads, mixtures, residuals, reasons, exposed=exposed
    )
    beside = re.compile("|".join(f"(?:{pattern})" for pattern in (*ASIDE, *aside)))
    known = architecture.symmetry.legs
    unknown = next((name for name in names.shapes if name not in known and beside.fullmatch(name) is None), None)
    if not residuals or unknown is None:
        return architecture
    reasons["residual"] = f"tensor {unknown} may read the stream in a way this version does not know"
    return replace(architecture, residuals=(), missing=reasons)


def is_headless(config: Config) -> bool:
    """Whether the config names a class without an output head, such as LlamaModel."""
    classes = setting(config, "architectures", default=())
    return bool(classes) and not re.search(r"For[A-Z]|LMHead|WithProjection", str(classes[0]))


def language_model_streams(
    config: Config,
    names: Names,
    blocks: Sequence[Attention | FeedForward],
    kind: Literal["rms", "layer"],
    *,
    embedding: str,
    final: str | None,
    norms: Sequence[Norm],
    embedding_axis: int = -1,
    others: Iterable[StreamAxis] = (),
    heads: Sequence[StreamAxis] | None = None,
    mixtures: tuple[Mixture, ...] = (),
    is_tied_by_default: bool = False,
    offset: float = 0.0,
    positions: str | None = None,
    parallel: Iterable[Sequence[str]] = (),
) -> tuple[list[Residual], dict[str, str]]:
    """The stream of a decoder-only model, or the reason why it has none that may change.

    Args:
        embedding: the tensor [vocabulary, hidden]; with the stream on ``embedding_axis`` if that is not its last.
        final: the last norm; None where the head reads the stream as it is.
        norms: every other norm.
        others: further writers, readers or gains, positions for instance.
        heads: readers of the last norm; found by their usual names when None.
        positions: the table that is added to the embedding.
        parallel: blocks that read one state of the stream, so that what they add is added up before anything reads it.
    """
    if embedding not in names:
        return [], {"residual": f"tensor {embedding} is missing"}
    stored = reads(names, *(f"{head}.weight" for head in HEADS)) if heads is None else list(heads)
    is_tied = bool(setting(config, "tie_word_embeddings", default=is_tied_by_default))
    has_task_head = any(not axis.tensor.startswith(("lm_head", "embed_out")) for axis in stored)
    is_exposed = not stored and (not is_tied or is_headless(config))
    tied = None
    if is_tied and not has_task_head and not is_exposed:
        tied = embedding
    every = list(norms)
    if final is not None:
        # Weights that transformers ties are read from the embedding, whatever else is stored.
        every.append(norm(names, final, () if tied else stored, offset))
    embeddings = writes(names, embedding, axis=embedding_axis)
    outputs = {block.name: output_bias(block) for block in blocks}
    sums = [[Rows(outputs[name]) for name in together] for together in parallel]
    # A vector added to an embedding that is the output head too would be added to every logit.
    if positions is not None and tied is None and embedding_axis == -1:
        sums.append([Rows(embedding), Rows(positions)])
    stream = residual(
        names,
        "residual",
        names.shapes[embedding][embedding_axis],
        kind,
        embeddings=embeddings,
        blocks=blocks,
        norms=every,
        mixtures=mixtures,
        others=[*others, *stored],
        tied=tied,
        is_exposed=is_exposed,
        is_normed_out=final is not None,
        sums=sums,
    )
    return [stream], {"residual": EXPOSED} if is_exposed else {}


def cross_readers(blocks: Iterable[Attention | FeedForward]) -> list[StreamAxis]:
    """All through which cross-attention reads the other stack."""
    attentions = (block for block in blocks if isinstance(block, Attention) and block.is_cross)
    return [axis for block in attentions for axis in memory_readers(block)]
