"""Activations to evaluate blocks on, for comparing two checkpoints.

Random numbers will do as long as both checkpoints keep the residual stream in one basis. Where the stream's own basis
may differ, an activation is a random combination of the checkpoint's embeddings, and an output is read by its products
with others: all of them change basis together, so equal functions give equal numbers whatever the bases are, and
nobody has to know them.

    input    norm(C E)      C random [tokens, vocabulary], E the embedding [vocabulary, hidden], the reader's own norm
    output   (C' E) y
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.architecture.blocks import Attention, Latent
from unmergeable.architecture.residual import Norm, Residual, StreamAxis
from unmergeable.checkpoint.source import TensorSource
from unmergeable.randomness import Stream

TOKENS = 8
CHUNK_ELEMENTS = 1 << 20


class Activations(Protocol):
    """Inputs and outputs of one checkpoint's blocks.

    ``along``: tensors outside blocks that lie along a stream. ``seen_through_readers``: gains and biases of norms that
    enter only with the weights behind them.
    """

    @property
    def along(self) -> Set[str]: ...

    @property
    def seen_through_readers(self) -> Set[str]: ...

    def inputs(self, weight: str, features: int) -> Tensor:
        """What the tensor ``weight`` is applied to, float64 [features, tokens]."""
        ...

    def readout(self, weight: str, output: Tensor) -> Tensor:
        """``output`` [hidden, tokens] of the tensor ``weight`` as numbers that do not depend on a basis."""
        ...

    def contracted(self, name: str) -> Tensor:
        """A tensor that lies along a stream, as numbers that do not depend on the basis."""
        ...


@dataclass(frozen=True)
class RandomActivations:
    """Standard normal inputs, outputs as they are: for streams in one basis."""

    stream: Stream
    along: Set[str] = frozenset()
    seen_through_readers: Set[str] = frozenset()

    @classmethod
    def of(cls, source: TensorSource, architecture: Architecture, stream: Stream) -> RandomActivations:
        return cls(stream)

    def inputs(self, weight: str, features: int) -> Tensor:
        return torch.from_numpy(self.stream.child(f"input.{features}").normal(features, TOKENS))

    def readout(self, weight: str, output: Tensor) -> Tensor:
        return output

    def contracted(self, name: str) -> Tensor:
        raise KeyError(name)  # nothing lies along a stream here


class StreamActivations:
    """Activations in the basis of the checkpoint itself."""

    def __init__(self, source: TensorSource, architecture: Architecture, stream: Stream) -> None:
        self._source = source
        self._random = RandomActivations(stream)
        self._latents = {
            latent.expand: latent
            for block in architecture.blocks
            if isinstance(block, Attention)
            for latent in block.latents
        }
        self._axes: dict[str, list[tuple[Residual, StreamAxis]]] = {}
        self._norms: dict[str, Norm] = {}
        self._inputs: dict[str, Tensor] = {}
        self._probes: dict[str, Tensor] = {}
        seen: set[str] = set()
        for residual in architecture.residuals:
            self._add(residual, stream.child(residual.name))
            seen |= {
                name for norm in residual.norms if norm.readers for name in (norm.gain, norm.bias) if name is not None
            }
        self.along: Set[str] = frozenset(self._axes)
        self.seen_through_readers: Set[str] = frozenset(seen)

    @classmethod
    def of(cls, source: TensorSource, architecture: Architecture, stream: Stream) -> StreamActivations:
        return cls(source, architecture, stream)

    def _add(self, residual: Residual, stream: Stream) -> None:
        first = residual.axes[0]
        vectors = self._source.tensor(first.tensor).movedim(first.axis, 0)
        matrix = vectors.reshape(vectors.shape[0], -1)[: residual.size].T  # [vectors, hidden]
        mixing = torch.from_numpy(stream.normal(matrix.shape[0], 2 * TOKENS)) / matrix.shape[0] ** 0.5
        mixed = product(matrix, mixing, is_transposed=True)  # [hidden, 2 * tokens]
        self._inputs[residual.name] = _normalised(mixed[:, :TOKENS], residual.kind)
        self._probes[residual.name] = _normalised(mixed[:, TOKENS:], residual.kind)
        for axis in residual.axes:
            self._axes.setdefault(axis.tensor, []).append((residual, axis))
        for norm in residual.norms:
            self._norms |= {reader.tensor: norm for reader in norm.readers}
            if not norm.readers:
                self._axes.setdefault(norm.gain, []).append((residual, StreamAxis(norm.gain, 0, "gain")))
                if norm.bias is not None:
                    self._axes.setdefault(norm.bias, []).append((residual, StreamAxis(norm.bias, 0, "vector")))

    def inputs(self, weight: str, features: int) -> Tensor:
        if weight in self._latents:
            return self._latent(self._latents[weight])
        for residual, axis in self._axes.get(weight, []):
            if axis.variance == "covector":
                return self._read(residual, axis)
        return self._random.inputs(weight, features)

    def _read(self, residual: Residual, axis: StreamAxis) -> Tensor:
        """What a reader sees of the stream: behind its norm, if it has one; [copies * hidden, tokens]."""
        seen, norm = self._inputs[residual.name], self._norms.get(axis.tensor)
        if norm is not None:
            seen = seen * (self._source.tensor(norm.gain).double() + norm.offset)[:, None]
            if norm.bias is not None:
                seen = seen + self._source.tensor(norm.bias).double()[:, None]
        return seen.repeat(axis.copies, 1)

    def _latent(self, latent: Latent) -> Tensor:
        """The normalised latent that ``expand`` reads, [size, tokens]."""
        compress = self._source.tensor(latent.compress)
        rows = product(compress, self.inputs(latent.compress, compress.shape[1]), is_transposed=False)
        if latent.bias is not None:
            rows = rows + self._source.tensor(latent.bias).double()[:, None]
        rows = rows[: latent.size]
        rows = rows * torch.rsqrt(rows.square().mean(0, keepdim=True) + latent.epsilon)
        return rows * self._source.tensor(latent.gain).double()[:, None]

    def readout(self, weight: str, output: Tensor) -> Tensor:
        for residual, axis in self._axes.get(weight, []):
            if axis.variance == "vector":
                return self._probes[residual.name].T @ output
        return output

    def contracted(self, name: str) -> Tensor:
        tensor = self._source.tensor(name)
        for residual, axis in self._axes[name]:
            if axis.variance == "covector":
                along = self._read(residual, axis)
            else:
                # A gain takes the order of the stream but not its signs: squares do the same.
                probes = self._probes[residual.name]
                along = probes.square() if axis.variance == "gain" else probes
            length = along.shape[0]
            rest = tensor.movedim(axis.axis, -1)
            flat = rest.reshape(-1, rest.shape[-1])[:, :length]
            tensor = product(flat, along, is_transposed=False).reshape(*rest.shape[:-1], TOKENS).movedim(-1, axis.axis)
        return tensor.double()


def _normalised(vectors: Tensor, kind: str) -> Tensor:
    """Columns of [hidden, tokens] as a norm without gain leaves them."""
    if kind == "layer":
        vectors = vectors - vectors.mean(0, keepdim=True)
    return vectors / vectors.square().mean(0, keepdim=True).sqrt().clamp_min(1e-30)


def product(weight: Tensor, inputs: Tensor, *, is_transposed: bool) -> Tensor:
    """``weight @ inputs`` (or ``weight.T @ inputs``) in float64, converting the weight a chunk at a time.

    Half-precision weights are converted to float32, whose error is far below theirs; others to float64.
    """
    compute = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else torch.float64
    # With few inputs, (x^T W^T)^T streams the weight three times as fast as W x.
    rows = inputs.to(compute).T.contiguous()
    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    if not is_transposed:
        return torch.cat([rows @ chunk.to(compute).T for chunk in weight.split(step)], dim=1).double().T
    pieces = zip(weight.split(step), rows.split(step, dim=1), strict=True)
    return torch.stack([part @ chunk.to(compute) for chunk, part in pieces]).sum(0).double().T
