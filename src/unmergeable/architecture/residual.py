"""The residual stream: the basis that every block reads from and adds to.

Pre-norm blocks see a stream x only through norms, and add to it. With R on everything that writes and R^-T on
everything that reads, x' = R x; what R may be is decided by the norms in between:

    RMS    x / |x| . g      signed permutations, the gains g permuted with them; every rotation while g is one number,
                            which it becomes when diag(g) is moved into the weights that read the norm
    layer  subtracts the mean: permutations, and one sign; with the gains folded likewise, every rotation that takes the
           vector of ones to itself or its negative, and so the mean to the mean

A gain whose norm is read only by weights is free by itself: D g there, and D^-1 on the columns that read it. That is
the space by which a gain is moved into its readers, and out again. A gain that acts on what a block adds (Gemma 2,
OLMo 2, BERT), a layer scale, or an output head that is the embedding, stays where it is and keeps rotations out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from unmergeable.architecture.collector import Collector
from unmergeable.architecture.symmetry import GroupKind, Variance

if TYPE_CHECKING:
    from torch import Tensor

OUTPUT_HEAD = "lm_head.weight"
"""What transformers calls the output head where it is stored apart from the embedding."""


@dataclass(frozen=True)
class StreamAxis:
    """``axis`` of ``tensor`` lies along the stream; ``copies`` times for a head that reads [class token | mean].

    Vectors write to the stream (embeddings, output projections), covectors read it, gains multiply it. More
    coordinates may follow on the axis.
    """

    tensor: str
    axis: int
    variance: Variance
    copies: int = 1


@dataclass(frozen=True)
class Rows:
    """Rows ``first`` to ``last`` of a table along the stream, all by default. ``twins`` stand where they do: masks."""

    tensor: str
    first: int = 0
    last: int | None = None
    twins: tuple[str, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """A view [rows, hidden] of ``tensor``, which is this one's."""
        return tensor.view(-1, tensor.shape[-1])[self.first : self.last]


@dataclass(frozen=True)
class Norm:
    """A norm on the stream. ``readers`` are all that see its output; none where the output is the stream itself.

    ``offset``: 1 where a gain is stored as ``gain - 1``. ``then``: where the output is the stream itself, the block
    that alone reads it and adds to it before the next norm (BERT); empty elsewhere.
    """

    gain: str
    bias: str | None
    readers: tuple[StreamAxis, ...]
    offset: float = 0.0
    then: str = ""

    @property
    def space(self) -> str:
        """Name of the basis between the gain and its readers."""
        return f"{self.gain.removesuffix('.weight')}.gain"


@dataclass(frozen=True)
class Residual:
    """One stream. ``axes`` are all that lie along it but norms; the first is an embedding, a matrix of many vectors.

    ``tied`` names the embedding that is the output head too, which keeps rotations out until OUTPUT_HEAD is stored
    apart from it. ``layer_scales`` maps the gain on what a block adds to the name of the block. ``is_exposed``: the
    network gives the stream out, so that its basis is fixed and only the norms inside are of use; ``is_normed_out``: by
    a last norm. ``sums``: rows of which one of each is always added to the others', embeddings of words and positions
    for instance, so that a vector may be added to one and taken from another.
    """

    name: str
    size: int
    kind: Literal["rms", "layer"]
    axes: tuple[StreamAxis, ...]
    norms: tuple[Norm, ...]
    tied: str | None = None
    layer_scales: Mapping[str, str] = field(default_factory=dict)
    is_exposed: bool = False
    is_normed_out: bool = False
    sums: tuple[tuple[Rows, ...], ...] = ()

    @property
    def rotation_limit(self) -> str:
        """Why not every rotation is a symmetry after folding, empty where it is."""
        if self.kind == "layer":
            return "a LayerNorm subtracts the mean of the coordinates"
        return self.folding_limit

    @property
    def folding_limit(self) -> str:
        """Why gains cannot be moved out of the way of a rotation, empty where they can."""
        if any(axis.variance == "gain" for axis in self.axes):
            return "a layer scale multiplies what a block adds"
        if self.tied is not None and all(norm.readers for norm in self.norms[:-1]):
            return "the output head is the embedding; stored apart (untied), any rotation would do"
        if not all(norm.readers for norm in self.norms):
            return "the gain of a norm multiplies what a block adds, and cannot be moved into weights"
        return ""


def residual_rules(collector: Collector, residual: Residual) -> None:
    """The spaces of one stream: the gains of its norms, the stream as it stands, its rotations."""
    for norm in residual.norms:
        _norm_rules(collector, norm, residual.size)
    kind: GroupKind = "signed_permutation" if residual.kind == "rms" else "common_sign_permutation"
    limit = residual.rotation_limit
    _stream_space(collector, residual, residual.name, kind, limit or "any rotation once norm gains are folded away")
    folded = tuple(norm.space for norm in residual.norms)
    if limit:
        collector.missing[f"{residual.name}.rotation"] = limit
        if residual.kind == "layer" and folded and not residual.folding_limit:
            name = f"{residual.name}.centred_rotation"
            _stream_space(collector, residual, name, "centred_orthogonal", limit, folded)
        return
    _stream_space(collector, residual, f"{residual.name}.rotation", "orthogonal", "an RMS norm keeps lengths", folded)


def _norm_rules(collector: Collector, norm: Norm, size: int) -> None:
    if norm.offset:
        collector.gain_offset[norm.gain] = norm.offset
    if not norm.readers:
        return
    space = collector.space(
        norm.space, "norm", "diagonal", blocks=1, size=size, limit="a gain acts on every coordinate by itself"
    )
    collector.leg(space, norm.gain, "vector")
    collector.leg(space, norm.bias, "vector")
    for reader in norm.readers:
        collector.leg(space, reader.tensor, "covector", axis=reader.axis, spectators=((reader.copies, size),))


def _stream_space(
    collector: Collector, residual: Residual, name: str, kind: GroupKind, limit: str, folded: tuple[str, ...] = ()
) -> None:
    size = residual.size
    space = collector.space(name, "residual", kind, blocks=1, size=size, limit=limit, folded=folded)
    for axis in residual.axes:
        collector.leg(space, axis.tensor, axis.variance, axis=axis.axis, spectators=((axis.copies, size),))
    for norm in residual.norms:
        collector.leg(space, norm.gain, "gain")
        collector.leg(space, norm.bias, "vector")
