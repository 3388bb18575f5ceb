"""A network as its blocks and streams, with the symmetry map that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from unmergeable.architecture.blocks import Attention, FeedForward, Mixture, SharedHeads
from unmergeable.architecture.residual import Residual
from unmergeable.architecture.rules import symmetry_map
from unmergeable.architecture.symmetry import SymmetryMap


@dataclass(frozen=True)
class Architecture:
    """A network as its blocks. ``untouched`` are tensors the map knows and no block owns (norms, embeddings, heads).

    ``exposed`` are streams that the network gives out: their basis is fixed, the norms on them are declared all the
    same. ``missing`` says why a symmetry one might look for is not declared.
    """

    family: str
    blocks: tuple[Attention | FeedForward, ...]
    untouched: tuple[str, ...] = ()
    shared_heads: tuple[SharedHeads, ...] = ()
    mixtures: tuple[Mixture, ...] = ()
    residuals: tuple[Residual, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    exposed: tuple[Residual, ...] = ()
    symmetry: SymmetryMap = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        symmetry = symmetry_map(self.blocks, self.shared_heads, self.mixtures, self.residuals, self.missing)
        object.__setattr__(self, "symmetry", symmetry)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return tuple(block for block in self.blocks if isinstance(block, Attention))

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        return tuple(block for block in self.blocks if isinstance(block, FeedForward))
