r"""What a change of basis costs a model that is quantised afterwards, predicted from a few of its matrices.

Let Q round to 4 bits in groups of 64 along rows, and g be the change of basis. The weights that a quantised release
computes with are, in the original's coordinates, g^{-1} Q(g W). The loss is

    | (g^{-1} Q(g W) - W) G | / | (Q(W) - W) G |

with G the gains of the norm whose output the matrix reads: a column that the network multiplies by little counts for
little. 1 is what the expert loses when it is quantised itself. Elements of :mod:`unmergeable.gauge.grouped` leave it
there to the bit. Rotations and other permutations leave it there on average: whether the model is then better or worse
is luck, and at 4 bits a small one's perplexity may move by a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.act import edits, origins
from unmergeable.gauge.gauge import Gauge, undo

MATRICES = 12
"""How many are looked at, and fewer where they are large: a third of it at least."""

NUMBERS = 1 << 25
"""How many of all of them, if they are not fewer than a third then."""

GROUP = 64
LEVELS = 7
"""The largest integer of a symmetric 4-bit format."""

NOTICEABLE = 1.1
"""A loss beyond which the owner is warned, where matrices are drawn that do not keep it."""

_LARGEST_TENSOR = 1 << 26


def quantised_loss(source: TensorSource, architecture: Architecture, gauges: Sequence[Gauge]) -> float | None:
    """The loss of the module docstring, the root mean square over a few changed matrices; None where none is looked at.

    Args:
        source: the weights before the change.
        architecture: of it.
        gauges: the change, applied left to right.
    """
    symmetry = architecture.symmetry
    forth, back = edits(symmetry, gauges), edits(symmetry, undo(gauges))
    moved = set(origins(symmetry, gauges))
    names = [
        name
        for name in forth
        if name in source.index.entries
        and name not in moved
        and len(source.spec(name).shape) == 2
        and min(source.spec(name).shape) > 1
        and source.spec(name).numel <= _LARGEST_TENSOR
        and torch_dtype(source.spec(name).dtype).is_floating_point
    ]
    ratios = []
    for name in _looked_at({name: source.spec(name).numel for name in names}):
        original = source.tensor(name).float()
        gains = _gains(source, architecture, name)
        before = _norm(rounded(original).sub_(original), gains)
        if before > 0:
            turned = back[name](rounded(forth[name](original.clone())))
            ratios.append(_norm(turned.sub_(original), gains) / before)
    return math.sqrt(sum(ratio**2 for ratio in ratios) / len(ratios)) if ratios else None


def _looked_at(sizes: Mapping[str, int]) -> list[str]:
    """A few names that lie evenly: few enough that their numbers are about as many as are looked at."""
    if not sizes:
        return []
    count = NUMBERS * len(sizes) // sum(sizes.values())
    step = math.ceil(len(sizes) / min(MATRICES, max(MATRICES // 3, count)))
    return list(sizes)[::step]


def _norm(error: Tensor, gains: Tensor) -> float:
    """The Frobenius norm of a matrix times the gains, in place."""
    return float(torch.linalg.vector_norm(error.mul_(gains)))


def rounded(weight: Tensor) -> Tensor:
    """The nearest weights of 4 bits, in groups of 64 along rows with one scale each; a shorter rest is a group too."""
    whole = weight.shape[1] // GROUP * GROUP
    parts = [_rounded_groups(weight[:, :whole].unflatten(1, (-1, GROUP)).clone()).flatten(1)] if whole else []
    if whole < weight.shape[1]:
        parts.append(_rounded_groups(weight[:, whole:].clone()))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _rounded_groups(groups: Tensor) -> Tensor:
    """Each last row rounded to the multiples of its scale, in place."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = torch.maximum(-low, high) / LEVELS
    scale.masked_fill_(scale == 0, 1)  # a row of zeros stays one
    return groups.div_(scale).round_().mul_(scale)


def _gains(source: TensorSource, architecture: Architecture, name: str) -> Tensor:
    """What the network multiplies the inputs of a matrix by, of the matrix's shape up to broadcasting."""
    for stream in architecture.residuals:
        for norm in stream.norms:
            for reader in norm.readers:
                if reader.tensor == name and norm.gain in source.index.entries:
                    gain = (source.tensor(norm.gain).float() + norm.offset).repeat(reader.copies)
                    others = source.spec(name).shape[reader.axis] - len(gain)  # behind the stream on this axis
                    gain = torch.cat([gain, gain.new_ones(others)])
                    return gain[None, :] if reader.axis == 1 else gain[:, None]
    return torch.ones(1, 1)
