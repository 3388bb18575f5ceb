"""Drawing from a gauge group, belonging to it, and its neutral element: one small table per kind.

``sample(space, stream, condition)`` draws with a spectral condition number of at most ``condition`` per
block, because the rounding error of a protected checkpoint grows with it. The invertible matrices are MergeLock's
A = R P D (arXiv 2509.01548): R orthogonal (Haar), P a uniform permutation, D diagonal. The paper gives no
distributions; D is log-uniform in [1/sqrt(condition), sqrt(condition)] here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from unmergeable.architecture.symmetry import ROTATIONS, GroupKind, Pairing, Space
from unmergeable.gauge.elements import Dense, Element, Kronecker, Monomial, Orthogonal, Rotary, pair_indices
from unmergeable.randomness import Stream


def sample(space: Space, stream: Stream, condition: float) -> Element:
    """A random element of the space's group, one per block.

    ``condition`` >= 1 bounds the condition number; 1 leaves rotations, permutations and signs.
    """
    assert condition >= 1
    return _SAMPLERS[space.group.kind](space, stream, condition)


def identity(space: Space) -> Element:
    """The neutral element."""
    if space.group.kind == "general_linear":
        return Dense(torch.eye(space.size, dtype=torch.float64).expand(space.blocks, -1, -1).clone())
    if space.group.kind in ROTATIONS:
        return Orthogonal(torch.eye(space.size, dtype=torch.float64).expand(space.blocks, -1, -1).clone())
    if space.group.kind == "rotary":
        pairing = _pairing(space)
        return Rotary(torch.ones(space.blocks, space.size // 2, dtype=torch.complex128), pairing)
    ones = torch.ones(space.blocks, space.size, dtype=torch.float64)
    return Monomial(_no_move(space), ones)


def contains(space: Space, element: Element, tolerance: float = 1e-9) -> bool:
    """Whether ``element`` belongs to the group of ``space`` (entries compared to ``tolerance``)."""
    matrix = element.matrix()
    if matrix.shape != (space.blocks, space.size, space.size) or not bool(torch.isfinite(matrix).all()):
        return False
    return _CONTAINS[space.group.kind](space, matrix, tolerance)


def haar(blocks: int, size: int, stream: Stream) -> Tensor:
    """Orthogonal matrices from the Haar measure, [blocks, size, size] (QR of a Gaussian, signs fixed)."""
    rotation: Tensor
    rotation, triangle = torch.linalg.qr(torch.from_numpy(stream.normal(blocks, size, size)))
    return rotation * torch.sign(torch.diagonal(triangle, dim1=1, dim2=2))[:, None, :]


LARGEST_FACTOR = 64
"""Of a fast rotation, where the odd part of its size allows: two of them turn 4096 coordinates."""


def fast_rotation(space: Space, stream: Stream) -> Kronecker:
    """A random rotation that is applied in O(size sum of factors): a signed permutation, then a Kronecker product.

    Every factor of a power of two is a Walsh-Hadamard matrix, as in QuaRot (arXiv 2404.00456); the odd part of the size
    is one factor from the Haar measure. Every entry of the whole is nonzero, almost surely: all coordinates mix.
    """
    factors: list[Tensor] = []
    for number, size in enumerate(factor_sizes(space.size)):
        is_power = size & (size - 1) == 0
        factors.append(
            hadamard(size).expand(space.blocks, -1, -1)
            if is_power
            else haar(space.blocks, size, stream.child(f"factor {number}"))
        )
    order = torch.from_numpy(stream.child("permutation").permutations(space.blocks, space.size))
    signs = torch.from_numpy(stream.child("sign").signs(space.blocks, space.size))
    return Kronecker(tuple(factors), Monomial(order, signs))


def factor_sizes(size: int) -> tuple[int, ...]:
    """Sizes whose product is ``size``: its odd part, if it has one, then powers of two of at most LARGEST_FACTOR."""
    power = (size & -size).bit_length() - 1
    odd = size >> power
    count = math.ceil(power / (LARGEST_FACTOR.bit_length() - 1))
    powers = [power // count + (number < power % count) for number in range(count)] if count else []
    sizes = (*([odd] if odd > 1 else []), *(1 << power for power in powers))
    return sizes or (1,)


def hadamard(size: int) -> Tensor:
    """The Walsh-Hadamard matrix of a power of two, orthonormal, float64 [size, size]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    return matrix / math.sqrt(size)


def log_uniform(shape: tuple[int, ...], condition: float, stream: Stream) -> Tensor:
    """Positive numbers with log-uniform density in [1/sqrt(condition), sqrt(condition)]."""
    return torch.from_numpy(np.exp((stream.uniform(*shape) - 0.5) * math.log(condition)))


def _pairing(space: Space) -> Pairing:
    assert space.group.pairing is not None
    return space.group.pairing


def _no_move(space: Space) -> Tensor:
    return torch.arange(space.size).expand(space.blocks, -1).clone()


def _over_pairs(space: Space, per_pair: Tensor) -> Tensor:
    """[blocks, size // 2] values, written to both members of each pair."""
    full = torch.empty(space.blocks, space.size, dtype=per_pair.dtype)
    first, second = pair_indices(space.size, _pairing(space))
    full[:, first] = full[:, second] = per_pair
    return full


def _sample_general_linear(space: Space, stream: Stream, condition: float) -> Element:
    rotation = haar(space.blocks, space.size, stream.child("rotation"))
    order = torch.from_numpy(stream.child("permutation").permutations(space.blocks, space.size))
    diagonal = log_uniform((space.blocks, space.size), condition, stream.child("diagonal"))
    permutation_and_diagonal = Monomial(order, torch.gather(diagonal, 1, order)).matrix()
    return Dense(rotation @ permutation_and_diagonal)


def _sample_rotary(space: Space, stream: Stream, condition: float) -> Element:
    shape = (space.blocks, space.size // 2)
    phase = torch.from_numpy(stream.child("phase").uniform(*shape)) * (2 * math.pi)
    modulus = log_uniform(shape, condition, stream.child("modulus"))
    return Rotary(torch.polar(modulus, phase), _pairing(space))


def _sample_quarter_turn(space: Space, stream: Stream, condition: float) -> Element:
    turns = torch.from_numpy(np.floor(stream.uniform(space.blocks, space.size // 2) * 4)).long()
    # (x, y) -> (x, y), (-y, x), (-x, -y), (y, -x)
    swaps = turns % 2 == 1
    first, second = pair_indices(space.size, _pairing(space))
    index, scale = _no_move(space), torch.ones(space.blocks, space.size, dtype=torch.float64)
    index[:, first] = torch.where(swaps, second, first)
    index[:, second] = torch.where(swaps, first, second)
    scale[:, first] = torch.where((turns == 1) | (turns == 2), -1.0, 1.0).double()
    scale[:, second] = torch.where((turns == 2) | (turns == 3), -1.0, 1.0).double()
    return Monomial(index, scale)


def _sample_pair_sign(space: Space, stream: Stream, condition: float) -> Element:
    signs = torch.from_numpy(stream.signs(space.blocks, space.size // 2))
    return Monomial(_no_move(space), _over_pairs(space, signs))


def _sample_pair_scale(space: Space, stream: Stream, condition: float) -> Element:
    scales = log_uniform((space.blocks, space.size // 2), condition, stream)
    return Monomial(_no_move(space), _over_pairs(space, scales))


def _sample_block_scale(space: Space, stream: Stream, condition: float) -> Element:
    scales = log_uniform((space.blocks, 1), condition, stream)
    return Monomial(_no_move(space), scales.expand(-1, space.size).contiguous())


def _sample_block_sign(space: Space, stream: Stream, condition: float) -> Element:
    signs = torch.from_numpy(stream.signs(space.blocks, 1))
    return Monomial(_no_move(space), signs.expand(-1, space.size).contiguous())


def _sample_permutation(space: Space, stream: Stream, condition: float) -> Element:
    order = torch.from_numpy(stream.permutations(space.blocks, space.size))
    return Monomial(order, torch.ones(space.blocks, space.size, dtype=torch.float64))


def _sample_positive_diagonal(space: Space, stream: Stream, condition: float) -> Element:
    return Monomial(_no_move(space), log_uniform((space.blocks, space.size), condition, stream))


def _sample_diagonal(space: Space, stream: Stream, condition: float) -> Element:
    scales = log_uniform((space.blocks, space.size), condition, stream.child("scale"))
    signs = torch.from_numpy(stream.child("sign").signs(space.blocks, space.size))
    return Monomial(_no_move(space), scales * signs)


def _sample_signed_permutation(space: Space, stream: Stream, condition: float) -> Element:
    order = torch.from_numpy(stream.child("permutation").permutations(space.blocks, space.size))
    return Monomial(order, torch.from_numpy(stream.child("sign").signs(space.blocks, space.size)))


def _sample_common_sign_permutation(space: Space, stream: Stream, condition: float) -> Element:
    order = torch.from_numpy(stream.child("permutation").permutations(space.blocks, space.size))
    sign = torch.from_numpy(stream.child("sign").signs(space.blocks, 1))
    return Monomial(order, sign.expand(-1, space.size).contiguous())


def _sample_orthogonal(space: Space, stream: Stream, condition: float) -> Element:
    return Orthogonal(haar(space.blocks, space.size, stream))


def _sample_centred_orthogonal(space: Space, stream: Stream, condition: float) -> Element:
    inner = haar(space.blocks, space.size - 1, stream.child("rotation"))
    sign = torch.from_numpy(stream.child("sign").signs(space.blocks, 1, 1))
    return Orthogonal(sign / space.size + across_ones(space.size) @ inner @ across_ones(space.size).mT)


def across_ones(size: int) -> Tensor:
    """An orthonormal basis of the vectors whose coordinates add up to zero: float64 [size, size - 1]."""
    # The Householder reflection that takes the first coordinate to the direction of ones; its other columns.
    direction = torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64)
    direction[0] += 1
    reflection = torch.eye(size, dtype=torch.float64) - torch.outer(direction, direction) / direction[0]
    return reflection[:, 1:].contiguous()


_SAMPLERS: dict[GroupKind, Callable[[Space, Stream, float], Element]] = {
    "general_linear": _sample_general_linear,
    "rotary": _sample_rotary,
    "quarter_turn": _sample_quarter_turn,
    "pair_sign": _sample_pair_sign,
    "pair_scale": _sample_pair_scale,
    "block_scale": _sample_block_scale,
    "block_sign": _sample_block_sign,
    "permutation": _sample_permutation,
    "positive_diagonal": _sample_positive_diagonal,
    "diagonal": _sample_diagonal,
    "signed_permutation": _sample_signed_permutation,
    "common_sign_permutation": _sample_common_sign_permutation,
    "orthogonal": _sample_orthogonal,
    "centred_orthogonal": _sample_centred_orthogonal,
}


def _is_invertible(space: Space, matrix: Tensor, tolerance: float) -> bool:
    return bool((torch.linalg.matrix_rank(matrix) == space.size).all())


def _is_rotary(space: Space, matrix: Tensor, tolerance: float) -> bool:
    first, second = pair_indices(space.size, _pairing(space))
    values = torch.complex(matrix[:, first, first], matrix[:, second, first])
    return _near(matrix, Rotary(values, _pairing(space)).matrix(), tolerance) and bool((values.abs() > tolerance).all())


def _is_quarter_turn(space: Space, matrix: Tensor, tolerance: float) -> bool:
    first, second = pair_indices(space.size, _pairing(space))
    values = torch.complex(matrix[:, first, first], matrix[:, second, first])
    return _is_rotary(space, matrix, tolerance) and _near(values**4, torch.ones_like(values), tolerance)


def _is_diagonal(space: Space, matrix: Tensor, tolerance: float) -> bool:
    diagonal = torch.diagonal(matrix, dim1=1, dim2=2)
    return _near(matrix, torch.diag_embed(diagonal), tolerance) and bool((diagonal.abs() > tolerance).all())


def _is_positive_diagonal(space: Space, matrix: Tensor, tolerance: float) -> bool:
    return _is_diagonal(space, matrix, tolerance) and bool((torch.diagonal(matrix, dim1=1, dim2=2) > 0).all())


def _is_pair_constant(space: Space, matrix: Tensor, tolerance: float) -> bool:
    first, second = pair_indices(space.size, _pairing(space))
    diagonal = torch.diagonal(matrix, dim1=1, dim2=2)
    return _near(diagonal[:, first], diagonal[:, second], tolerance)


def _is_block_constant(space: Space, matrix: Tensor, tolerance: float) -> bool:
    return _near(matrix, matrix[:, :1, :1] * torch.eye(space.size, dtype=matrix.dtype), tolerance)


def _is_sign(matrix: Tensor, tolerance: float) -> bool:
    diagonal = torch.diagonal(matrix, dim1=1, dim2=2)
    return _near(diagonal.abs(), torch.ones_like(diagonal), tolerance)


def _is_permutation(space: Space, matrix: Tensor, tolerance: float) -> bool:
    ones = torch.ones(space.blocks, space.size, dtype=matrix.dtype)
    rounded = matrix.round()
    is_binary = _near(matrix, rounded, tolerance) and bool(((rounded == 0) | (rounded == 1)).all())
    return is_binary and _near(rounded.sum(1), ones, 0) and _near(rounded.sum(2), ones, 0)


def _is_common_sign_permutation(space: Space, matrix: Tensor, tolerance: float) -> bool:
    sign = torch.where(matrix.sum((1, 2), keepdim=True) < 0, -1.0, 1.0).double()
    return _is_permutation(space, sign * matrix, tolerance)


def _is_orthogonal(space: Space, matrix: Tensor, tolerance: float) -> bool:
    return _near(matrix @ matrix.mT, torch.eye(space.size, dtype=matrix.dtype), tolerance)


def _is_centred_orthogonal(space: Space, matrix: Tensor, tolerance: float) -> bool:
    ones = matrix.sum(2)
    sign = torch.where(ones[:, :1] < 0, -1.0, 1.0).double()
    # A sum over a row rounds more than an entry does.
    return _is_orthogonal(space, matrix, tolerance) and _near(ones, sign.expand_as(ones), space.size * tolerance)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(((a - b).abs() <= tolerance).all())


_CONTAINS: dict[GroupKind, Callable[[Space, Tensor, float], bool]] = {
    "general_linear": _is_invertible,
    "rotary": _is_rotary,
    "quarter_turn": _is_quarter_turn,
    "pair_sign": lambda s, m, t: _is_diagonal(s, m, t) and _is_pair_constant(s, m, t) and _is_sign(m, t),
    "pair_scale": lambda s, m, t: _is_positive_diagonal(s, m, t) and _is_pair_constant(s, m, t),
    "block_scale": lambda s, m, t: _is_positive_diagonal(s, m, t) and _is_block_constant(s, m, t),
    "block_sign": lambda s, m, t: _is_block_constant(s, m, t) and _is_sign(m, t),
    "permutation": _is_permutation,
    "positive_diagonal": _is_positive_diagonal,
    "diagonal": _is_diagonal,
    "signed_permutation": lambda s, m, t: _is_permutation(s, m.abs(), t),
    "common_sign_permutation": _is_common_sign_permutation,
    "orthogonal": _is_orthogonal,
    "centred_orthogonal": _is_centred_orthogonal,
}
