"""Nearest elements of the small groups, in closed form: signs, turns, phases, scales.

Each minimises sum |M x - y|^2 over the legs that transform as M x plus sum |M^-T x - y|^2 over those that transform as
M^-T x, where x is the protected checkpoint's coordinate and y the base's. What no data speak about stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmergeable.architecture import Space
from unmergeable.attacks.moments import LegPair, Moments, PairMoments, diagonal_moments, pair_moments, pair_products
from unmergeable.gauge.elements import Monomial, Rotary, pair_indices, split_pairs
from unmergeable.sums import PIECE

PHASE_ITERATIONS = 100
PHASE_TOLERANCE = 1e-14


def nearest_pair_sign(space: Space, legs: Sequence[LegPair]) -> Monomial:
    """The sign of the summed inner product, per frequency pair."""
    vectors, covectors = _pairs(space, legs)
    return _scaled(space, over_pairs(space, _sign((vectors.cross + covectors.cross).real)))


def nearest_block_sign(space: Space, legs: Sequence[LegPair]) -> Monomial:
    """The sign of the summed inner product, per block."""
    vectors, covectors = _diagonals(space, legs)
    return _over_block(space, _sign((vectors.cross + covectors.cross).sum(1)))


def nearest_diagonal_sign(space: Space, legs: Sequence[LegPair]) -> Monomial:
    """The sign of the inner product, per coordinate."""
    vectors, covectors = _diagonals(space, legs)
    return _scaled(space, _sign(vectors.cross + covectors.cross))


def nearest_phase(space: Space, legs: Sequence[LegPair]) -> Rotary:
    """The unit complex number nearest to both sides, per frequency pair: the phase of the summed products."""
    vectors, covectors = _pairs(space, legs)
    assert space.group.pairing is not None
    return Rotary(_phase(vectors.cross + covectors.cross), space.group.pairing)


def nearest_rotary(space: Space, legs: Sequence[LegPair]) -> Rotary:
    """The complex number z = r e^(i phi) nearest to both sides, per frequency pair.

    For fixed r the best phase is that of r c + c~/r, with c and c~ the products of the two sides; for fixed phase r
    solves the quartic of :func:`nearest_scale`. The two alternate from phi = arg(c/|c| + c~/|c~|) until they agree:
    at once where both sides ask for the same phase, as they do at a planted key.
    """
    vectors, covectors = _pairs(space, legs)
    phase = _phase(_phase(vectors.cross, empty=0.0) + _phase(covectors.cross, empty=0.0))
    modulus = torch.ones_like(vectors.protected)
    for _ in range(PHASE_ITERATIONS):
        along = [(side.cross * phase.conj()).real for side in (vectors, covectors)]
        modulus = nearest_scale(vectors.protected, along[0], covectors.protected, along[1])
        previous, phase = phase, _phase(modulus * vectors.cross + covectors.cross / modulus)
        if bool(((phase - previous).abs() <= PHASE_TOLERANCE).all()):
            break
    is_known = (vectors.cross != 0) | (covectors.cross != 0)
    assert space.group.pairing is not None
    return Rotary(torch.where(is_known, modulus * phase, 1.0), space.group.pairing)


def nearest_quarter_turn(space: Space, legs: Sequence[LegPair]) -> Monomial:
    """The multiple of 90 degrees nearest to the base, per frequency pair, gains swapped along.

    Heads vote for an odd or an even number of quarter turns with the size of their products, because each may also
    have a sign of its own (estimated next), under which products of different heads would cancel.
    """
    even = torch.zeros(space.blocks, space.size // 2, dtype=torch.float64)
    odd, total = torch.zeros_like(even), torch.zeros_like(even, dtype=torch.complex128)
    for leg in legs:
        if leg.variance == "gain":
            kept, swapped = _gain_products(space, leg)
            even, odd = even + kept, odd + swapped
        else:
            products = torch.stack([pair_products(space, x, y) for x, y in leg.chunks(PIECE)]).sum(0)
            even, odd = even + products.real.abs().sum(1), odd + products.imag.abs().sum(1)
            total = total + products.sum(1)
    is_odd = odd > even
    return _turned(space, is_odd, _sign(torch.where(is_odd, total.imag, total.real)))


def nearest_pair_scale(space: Space, legs: Sequence[LegPair]) -> Monomial:
    """The positive factor nearest to the base, per frequency pair."""
    vectors, covectors = _pairs(space, legs)
    scale = nearest_scale(vectors.protected, vectors.cross.real, covectors.protected, covectors.cross.real)
    return _scaled(space, over_pairs(space, scale))


def nearest_block_scale(space: Space, legs: Sequence[LegPair]) -> Monomial:
    """The positive factor nearest to the base, per block."""
    sums = [value.sum(1) for side in _diagonals(space, legs) for value in (side.protected, side.cross)]
    return _over_block(space, nearest_scale(*sums))


def nearest_positive_diagonal(space: Space, legs: Sequence[LegPair]) -> Monomial:
    """The positive factor nearest to the base, per coordinate."""
    vectors, covectors = _diagonals(space, legs)
    return _scaled(space, nearest_scale(vectors.protected, vectors.cross, covectors.protected, covectors.cross))


def nearest_diagonal(space: Space, legs: Sequence[LegPair]) -> Monomial:
    """The factor of either sign nearest to the base, per coordinate."""
    vectors, covectors = _diagonals(space, legs)
    data = (vectors.protected, vectors.cross, covectors.protected, covectors.cross)
    flipped = (vectors.protected, -vectors.cross, covectors.protected, -covectors.cross)
    positive, negative = nearest_scale(*data), nearest_scale(*flipped)
    is_positive = _scale_objective(positive, *data) <= _scale_objective(negative, *flipped)
    return _scaled(space, torch.where(is_positive, positive, -negative))


def nearest_orthogonal(cross: Tensor) -> Tensor:
    """The orthogonal R = U V^T that maximises <R, C> (Procrustes; Kabsch 1976), from C = y x^T = U S V^T, batched."""
    left, _, right = torch.linalg.svd(cross)
    rotation: Tensor = left @ right
    return rotation


def nearest_scale(vector_norm: Tensor, vector_cross: Tensor, covector_norm: Tensor, covector_cross: Tensor) -> Tensor:
    """The a > 0 that minimises a^2 g - 2 a c + h / a^2 - 2 d / a, elementwise.

    g, c are sum x^2 and sum x y of the vector legs, h, d those of the covector legs. The stationary points solve
    g a^4 - c a^3 + d a - h = 0, a quartic with at least one positive root when g, h > 0. 1 where there is no minimum.
    """
    g, c, h, d = vector_norm, vector_cross, covector_norm, covector_cross
    # In units of (h / g)^(1/4) the quartic is x^4 - p x^3 + q x - 1, whose companion matrix is well scaled.
    has_both = (g > 0) & (h > 0)
    unit = torch.where(has_both, h / g, 1.0) ** 0.25
    p = torch.where(has_both, unit**3 * c / h, 0.0)
    q = torch.where(has_both, unit * d / h, 0.0)
    companion = torch.zeros(*g.shape, 4, 4, dtype=torch.float64)
    companion[..., 1, 0] = companion[..., 2, 1] = companion[..., 3, 2] = 1.0
    companion[..., 0, 3], companion[..., 1, 3], companion[..., 3, 3] = 1.0, -q, p
    # Any positive number may be tried: a complex root's real part does no harm, and a double root loses none.
    roots = torch.where(has_both[..., None], torch.linalg.eigvals(companion).real * unit[..., None], 1.0)
    one_sided = torch.stack([c / g, h / d, torch.ones_like(g)], dim=-1)
    candidates = torch.cat([roots, one_sided], dim=-1)
    candidates = torch.where(candidates.isfinite() & (candidates > 0), candidates, 1.0)
    values = _scale_objective(candidates, *(value[..., None] for value in (g, c, h, d)))
    best = values.nan_to_num(nan=torch.inf).argmin(-1, keepdim=True)
    return torch.gather(candidates, -1, best)[..., 0]


def over_pairs(space: Space, per_pair: Tensor) -> Tensor:
    """[blocks, pairs] values, written to both members of each pair."""
    assert space.group.pairing is not None
    full = torch.empty(space.blocks, space.size, dtype=per_pair.dtype)
    first, second = pair_indices(space.size, space.group.pairing)
    full[:, first] = full[:, second] = per_pair
    return full


def _scale_objective(a: Tensor, g: Tensor, c: Tensor, h: Tensor, d: Tensor) -> Tensor:
    return a.square() * g - 2 * a * c + h / a.square() - 2 * d / a


def _pairs(space: Space, legs: Sequence[LegPair]) -> tuple[PairMoments, PairMoments]:
    return pair_moments(space, legs, "vector"), pair_moments(space, legs, "covector")


def _diagonals(space: Space, legs: Sequence[LegPair]) -> tuple[Moments, Moments]:
    return diagonal_moments(space, legs, "vector"), diagonal_moments(space, legs, "covector")


def _sign(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0).double()


def _phase(values: Tensor, *, empty: float = 1.0) -> Tensor:
    """``z / |z|``, and ``empty`` where z is zero."""
    magnitude = values.abs()
    return torch.where(magnitude > 0, values / magnitude.clamp(min=1e-300), torch.full_like(values, empty))


def _gain_products(space: Space, leg: LegPair) -> tuple[Tensor, Tensor]:
    """Inner products of gains with the base's per pair, as they are and with the pair's two gains swapped."""
    kept, swapped = torch.zeros(2, space.blocks, space.size // 2, dtype=torch.float64)
    for x, y in leg.chunks(PIECE):
        (x_first, x_second), (y_first, y_second) = _split(space, x), _split(space, y)
        kept += (x_first * y_first + x_second * y_second).sum((0, 2, 4))
        swapped += (x_second * y_first + x_first * y_second).sum((0, 2, 4))
    return kept, swapped


def _split(space: Space, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    assert space.group.pairing is not None
    return split_pairs(coordinates, space.group.pairing)


def _scaled(space: Space, scale: Tensor) -> Monomial:
    """The diagonal element with ``scale`` [blocks, size]."""
    return Monomial(torch.arange(space.size).expand(space.blocks, -1).clone(), scale)


def _over_block(space: Space, scale: Tensor) -> Monomial:
    return _scaled(space, scale[:, None].expand(-1, space.size).contiguous())


def _turned(space: Space, is_odd: Tensor, sign: Tensor) -> Monomial:
    """``sign`` times (x, y) -> (x, y), or times (x, y) -> (-y, x) where ``is_odd``."""
    assert space.group.pairing is not None
    first, second = pair_indices(space.size, space.group.pairing)
    index = torch.arange(space.size).expand(space.blocks, -1).clone()
    scale = torch.empty(space.blocks, space.size, dtype=torch.float64)
    index[:, first] = torch.where(is_odd, second, first)
    index[:, second] = torch.where(is_odd, first, second)
    scale[:, first] = torch.where(is_odd, -sign, sign)
    scale[:, second] = sign
    return Monomial(index, scale)
