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
from collections.abc import Sequence

import torch
from torch import Tensor

from unmergeable.architecture import Architecture
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.source import TensorSource
from unmergeable.gauge.act import edits, origins
from unmergeable.gauge.gauge import Gauge, undo

MATRICES = 12
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
    step = max(1, math.ceil(len(names) / MATRICES))
    ratios = []
    for name in names[::step]:
        original = source.tensor(name).double()
        gains = _gains(source, architecture, name)
        plain = rounded(original) - original
        turned = back[name](rounded(forth[name](original.clone()))) - original
        before = float(torch.linalg.vector_norm(plain * gains))
        if before > 0:
            ratios.append(float(torch.linalg.vector_norm(turned * gains)) / before)
    return math.sqrt(sum(ratio**2 for ratio in ratios) / len(ratios)) if ratios else None


def rounded(weight: Tensor) -> Tensor:
    """The nearest weights of 4 bits, in groups of 64 along rows with one scale each; a shorter rest is a group too."""
    result = torch.empty_like(weight)
    for begin in range(0, weight.shape[1], GROUP):
        columns = slice(begin, begin + GROUP)
        group = weight[:, columns]
        scale = group.abs().amax(1, keepdim=True) / LEVELS
        result[:, columns] = torch.where(scale > 0, (group / scale).round() * scale, group)
    return result


def _gains(source: TensorSource, architecture: Architecture, name: str) -> Tensor:
    """What the network multiplies the inputs of a matrix by, of the matrix's shape up to broadcasting."""
    for stream in architecture.residuals:
        for norm in stream.norms:
            for reader in norm.readers:
                if reader.tensor == name and norm.gain in source.index.entries:
                    gain = (source.tensor(norm.gain).double() + norm.offset).repeat(reader.copies)
                    others = source.spec(name).shape[reader.axis] - len(gain)  # behind the stream on this axis
                    gain = torch.cat([gain, gain.new_ones(others)])
                    return gain[None, :] if reader.axis == 1 else gain[:, None]
    return torch.ones(1, 1, dtype=torch.float64)
