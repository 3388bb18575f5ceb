"""Permutations of experts, heads and hidden units, recognised by what no basis inside them alters.

Heads: the product of the two factors of a head does not depend on the head's basis,

    O_g' V_g' = (O_g B^-1)(B V_g) = O_g V_g        Q_g'^T K_g' = Q_g^T K_g   where nothing lies between them

so the cosine between the product of a protected head and that of a base's head is 1 for a head that did not change.
The products are never formed: <U^T W, U0^T W0> = <U U0^T, W W0^T>, over the few coordinates of a head.

Hidden units: :mod:`~unmergeable.attacks.hidden_units`. Experts: the cosine between the router's rows, which belong to
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Leg, Space, SymmetryMap
from unmergeable.attacks.hidden_units import UnitSimilarity, match_units
from unmergeable.attacks.matching import Match, match
from unmergeable.attacks.moments import LegPair, block_products, dense_moments, leg_pairs, legs_by_space
from unmergeable.attacks.reading import Reader
from unmergeable.gauge.elements import Monomial
from unmergeable.progress import Progress


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

    def matched(space: Space) -> Match:
        if space.role == "heads":
            members = _products_of(space, architecture.symmetry, legs)
            return match(torch.stack([one_head_space(member) for member in members]).mean(0))
        names = dict.fromkeys(name for name, _ in legs[space.name])
        return match_units(blocks[space.name], protected(names), base(names), unit_similarity)

    wanted = [
        space
        for space in spaces.values()
        if space.group.kind == "permutation" and space.role in ("heads", "feed_forward")
    ]
    matches: dict[str, Match] = {}
    for done, space in enumerate(wanted, start=1):
        matches[space.name] = matched(space)
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
