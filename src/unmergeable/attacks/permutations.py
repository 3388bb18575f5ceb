"""Permutations of experts, heads and hidden units, recognised by what no basis inside them alters.

Heads: the product of the two factors of a head does not depend on the head's basis,

    O_g' V_g' = (O_g B^-1)(B V_g) = O_g V_g        Q_g'^T K_g' = Q_g^T K_g   where nothing lies between them

so the cosine between the product of a protected head and that of a base's head is 1 for a head that did not change.
The products are never formed: <U^T W, U0^T W0> = <U U0^T, W W0^T>, over the few coordinates of a head.

Hidden units, with rows g, u (gate, up) and columns d (down) of a unit, and g0, u0, d0 the base's:

    only permuted              <u, u0> + <d, d0>                the exact objective of the nearest permutation
    scaled by c > 0 (relu)     cos(u, u0) + cos(d, d0)
    scaled by c, gated         cos(g, g0) + cos(u, u0) cos(d, d0)        no scale or sign of c changes it

Experts: the cosine between the router's rows, which belong to them.

Every matrix of similarities goes to :func:`~unmergeable.gauge.assignment.best_assignment`. The published attack on
PaRaMS (arXiv 2503.07661) uses the first line throughout: :func:`permuted_similarity`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, FeedForward, Leg, Space, SymmetryMap
from unmergeable.architecture.blocks import Heads
from unmergeable.attacks.moments import LegPair, block_products, dense_moments, leg_pairs, legs_by_space
from unmergeable.attacks.reading import Reader
from unmergeable.gauge.assignment import best_assignment
from unmergeable.gauge.elements import Monomial
from unmergeable.progress import Progress

Tensors = Mapping[str, Tensor]

UnitSimilarity = Callable[[FeedForward, Tensors, Tensors], Tensor]
"""``similarity(block, protected, base)``: float32 [base's hidden units, protected hidden units]."""

CHUNK_ELEMENTS = 1 << 24
"""Entries of a matrix of similarities computed at a time (64 MiB in float32)."""


@dataclass(frozen=True)
class Match:
    """A permutation, and how clear it was.

    ``margin``, from 0 to 1: by how much a coordinate is more similar to its match than to any other, relative to the
    former; the median over coordinates. Near 0 the permutation is a guess.
    """

    permutation: Monomial
    margin: float


def match(similarity: Tensor) -> Match:
    """The permutation that puts the most similar coordinates in the base's places; ``similarity`` [base, protected]."""
    if len(similarity) == 1:
        return Match(Monomial(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.float64)), 1.0)
    index = best_assignment(similarity)
    return Match(Monomial(index[None], torch.ones(1, len(index), dtype=torch.float64)), _margin(similarity, index))


def match_experts(
    protected: Reader, base: Reader, architecture: Architecture, spaces: Mapping[str, Space], progress: Progress
) -> dict[str, Match]:
    """The permutation of experts behind every router, and of its groups of experts, among ``spaces``."""
    matches: dict[str, Match] = {}
    mixtures = [mixture for mixture in architecture.mixtures if f"{mixture.name}.experts" in spaces]
    for done, mixture in enumerate(mixtures, start=1):
        ours, theirs = (reader([mixture.router])[mixture.router] for reader in (protected, base))
        similarity = router_similarity(ours, theirs)
        size = len(mixture.experts) // mixture.groups
        tiles = similarity.view(mixture.groups, size, mixture.groups, size).transpose(1, 2)
        inside = [[match(tile) for tile in row] for row in tiles]
        # What two groups have in common is what their experts have, in the best permutation inside.
        shared = [
            [_total(tile, best) for tile, best in zip(*pair, strict=True)] for pair in zip(tiles, inside, strict=True)
        ]
        groups = match(torch.tensor(shared))
        place = groups.permutation.index[0]
        # The permutation inside acts first, while a group still stands where the protection put it.
        best = [inside[int(base_group)][group] for group, base_group in enumerate(torch.argsort(place))]
        index = torch.cat([item.permutation.index for item in best])
        margin = min(item.margin for item in best)
        matches[f"{mixture.name}.experts"] = Match(
            Monomial(index, torch.ones(index.shape, dtype=torch.float64)), margin
        )
        if mixture.groups > 1:
            matches[f"{mixture.name}.expert_groups"] = groups
        progress("matching", done, len(mixtures), "routers")
    return matches


def router_similarity(protected: Tensor, base: Tensor) -> Tensor:
    """Cosines between the routers' rows [experts, hidden]: float64 [base's experts, protected experts].

    Less their mean, which a softmax does not see.
    """
    theirs, ours = (side.double() - side.double().mean(0) for side in (base, protected))
    theirs, ours = (side / side.norm(dim=1, keepdim=True).clamp(min=1e-300) for side in (theirs, ours))
    cosines: Tensor = theirs @ ours.T
    return cosines


def _total(similarity: Tensor, best: Match) -> float:
    return float(similarity.gather(1, best.permutation.index.T).sum())


def match_permutations(
    protected: Reader,
    base: Reader,
    architecture: Architecture,
    spaces: Mapping[str, Space],
    unit_similarity: UnitSimilarity,
    progress: Progress,
) -> dict[str, Match]:
    """The permutations of heads and of hidden units among ``spaces``, one block's tensors in memory at a time.

    Heads that only move together in all layers of a stack (T5) are matched by the mean over its layers.
    """
    legs = legs_by_space(architecture.symmetry)
    blocks = {f"{block.name}.order": block for block in architecture.feed_forwards}

    def one_head_space(space: Space) -> Tensor:
        names = dict.fromkeys(name for name, _ in legs[space.name])
        return head_similarity(space, leg_pairs(space, legs[space.name], protected(names), base(names), {}))

    def similarity(space: Space) -> Tensor:
        if space.role == "heads":
            members = _products_of(space, architecture.symmetry, legs)
            return torch.stack([one_head_space(member) for member in members]).mean(0)
        names = dict.fromkeys(name for name, _ in legs[space.name])
        return unit_similarity(blocks[space.name], protected(names), base(names))

    wanted = [
        space
        for space in spaces.values()
        if space.group.kind == "permutation" and space.role in ("heads", "feed_forward")
    ]
    matches: dict[str, Match] = {}
    for done, space in enumerate(wanted, start=1):
        matches[space.name] = match(similarity(space))
        progress("matching", done, len(wanted), "permutations")
    return matches


def _products_of(heads: Space, symmetry: SymmetryMap, legs: Mapping[str, Sequence[tuple[str, Leg]]]) -> list[Space]:
    """The spaces of the heads that ``heads`` reorders in which one product is left alone: of values and output, and of
    queries and keys where any invertible matrix is allowed."""
    tensors = {name for name, _ in legs[heads.name]}
    return [
        space
        for space in symmetry.select("query_key", "value_output").values()
        if (space.group.kind == "general_linear" or space.role == "value_output")
        and space.blocks == heads.size
        and tensors.issuperset(name for name, _ in legs[space.name])
    ]


def head_similarity(space: Space, legs: Sequence[LegPair]) -> Tensor:
    """Cosines between the heads' products, float64 [base's heads, protected heads], of one general linear space."""
    products = torch.ones((), dtype=torch.float64)
    ours, theirs = products, products
    for variance in ("vector", "covector"):
        products = products * block_products(space, legs, variance)
        own = dense_moments(space, legs, variance)
        ours, theirs = ours * own.protected, theirs * own.base
    inner = products.sum((1, 3))
    norms = [squares.sum((1, 2)).clamp(min=0).sqrt() for squares in (theirs, ours)]
    return inner / (norms[0][:, None] * norms[1][None, :]).clamp(min=1e-300)


def unit_similarity(block: FeedForward, protected: Tensors, base: Tensors) -> Tensor:
    """Similarity of hidden units whatever scale and sign the architecture lets each of them carry."""
    if block.gate is None and block.activation != "relu":
        return permuted_similarity(block, protected, base)
    up, down = (_cosines(_sides(heads, block.size, protected, base)) for heads in (block.up, block.down))
    if block.gate is None:
        return _by_rows(block.size, lambda rows: up(rows) + down(rows))
    gate = _cosines(_sides(block.gate, block.size, protected, base))
    return _by_rows(block.size, lambda rows: gate(rows) + up(rows) * down(rows))


def permuted_similarity(block: FeedForward, protected: Tensors, base: Tensors) -> Tensor:
    """Similarity of hidden units that carry no scale: inner products over all their weights."""
    every = [heads for heads in (block.gate, block.up, block.down) if heads is not None]
    factors = [_sides(heads, block.size, protected, base) for heads in every]
    return _by_rows(block.size, lambda rows: torch.stack([theirs[rows] @ ours.T for theirs, ours in factors]).sum(0))


def _margin(similarity: Tensor, index: Tensor) -> float:
    matched = similarity.gather(1, index[:, None])[:, 0]
    best, second = similarity.topk(2, dim=1).values.unbind(1)
    others = torch.where(matched < best, best, second)
    margins = torch.where(matched > 0, 1 - others / matched, 0.0)
    return float(margins.clamp(0, 1).median())


def _by_rows(size: int, similarity: Callable[[slice], Tensor]) -> Tensor:
    """A [size, size] matrix from a function of some of its rows."""
    whole = torch.empty(size, size)
    step = max(1, CHUNK_ELEMENTS // size)
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        whole[rows] = similarity(rows)
    return whole


def _cosines(sides: tuple[Tensor, Tensor]) -> Callable[[slice], Tensor]:
    """Cosines between some of the base's units and all protected ones; a unit of zeros is similar to none."""
    theirs, ours = (side / side.norm(dim=1, keepdim=True).clamp(min=1e-30) for side in sides)
    return lambda rows: theirs[rows] @ ours.T


def _sides(heads: Heads, size: int, protected: Tensors, base: Tensors) -> tuple[Tensor, Tensor]:
    return _units(heads, size, base), _units(heads, size, protected)


def _units(heads: Heads, size: int, tensors: Tensors) -> Tensor:
    """Hidden units as the rows of a float32 matrix, with their biases as one more column."""
    places = slice(heads.offset, heads.offset + size * heads.element_stride, heads.element_stride)
    columns = [_along(heads, heads.axis, tensors[heads.weight])[places]]
    if heads.bias is not None:
        columns.append(_along(heads, heads.bias_axis, tensors[heads.bias])[places, None])
    return torch.cat(columns, dim=1).float()


def _along(heads: Heads, axis: int, tensor: Tensor) -> Tensor:
    """A tensor, or the slice of it that heads lie in, with the axis they lie on first."""
    if heads.slice is None:
        return tensor.movedim(axis, 0)
    return tensor[heads.slice].movedim(axis - 1, 0)
