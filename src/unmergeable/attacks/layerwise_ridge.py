"""``layerwise_ridge``: fit the base's layers to what the protected network's layers put out, on unlabelled inputs.

    W = argmin over W of  |X W - Y|^2 / rows + mu |W - W_0|^2,   mu = ridge * mean diagonal of X^T X / rows
      = W_0 + (X^T X / rows + mu I)^-1 (X^T Y / rows - (X^T X / rows) W_0)

What a block computes inside, it computes in a basis of its own, and that is where protections hide it: a query, a value
or a hidden unit of the protected network cannot be compared with the base's. What a block *adds to the residual stream*
can: whatever is done to the inside, the next layers have to understand it. So

    Y     what the output projection of a block (attention output, feed-forward down) puts out in the protected network
    X     what goes into that projection when the base's own block sees the protected network's stream
    W_0   the base's projection, and with it its bias

The readers of each block stay the base's, hence X is in the base's basis, and so is the W that turns it into Y. Every
block is shown the stream as the protected network leaves it (teacher forcing), which makes the layers independent: one
pass over the data gives them all, and errors do not add up from layer to layer while fitting.

Readers are not fitted. Their outputs exist only in the hidden basis, and aligning that to the base's freely gives the
base back: from fewer inputs than hidden units, a linear map turns any features into any others. Where the hiding is a
known symmetry, ``nearest_orbit`` restores the readers too and needs no data; this attack needs nothing to be known, and
takes polynomials as well as keys.

Tensors that lie along the stream alone (embeddings, norms, heads) are the protected network's. The stream itself must
be in the base's basis; after a protection that turns it, run ``nearest_orbit`` first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, Attention
from unmergeable.architecture.blocks import output_bias
from unmergeable.errors import UsageError


@dataclass(frozen=True)
class LayerwiseRidge:
    """Settings of the attack.

    Attributes:
        ridge: pull towards the base, relative to the mean square of the inputs.
        examples: the most that are read.
        seed: of which.
    """

    name: ClassVar[str] = "layerwise_ridge"
    summary: ClassVar[str] = "fit the base's output projections to what the protected blocks add to the residual stream"
    exact: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("base", "data")

    ridge: float = 1e-2
    examples: int = 1000
    seed: int = 0

    def validate(self) -> None:
        if not 0 < self.ridge < math.inf:
            raise UsageError(f"ridge={self.ridge}: must be positive, or what the inputs leave open has no answer.")
        if self.examples < 1:
            raise UsageError(f"examples={self.examples}: at least one is needed.")


def stream_writers(architecture: Architecture) -> tuple[str, ...]:
    """The weights through which blocks write to the residual stream, in the order of the blocks."""
    weights = [
        block.output.weight if isinstance(block, Attention) else block.down.weight for block in architecture.blocks
    ]
    return tuple(dict.fromkeys(weights))


def block_tensors(architecture: Architecture) -> frozenset[str]:
    """What stays or starts as the base's: all that a change of basis inside a block can alter, and what is fitted."""
    inside = architecture.symmetry.select("query_key", "value_output", "heads", "feed_forward", "experts")
    biases = {output_bias(block) for block in architecture.blocks}
    return frozenset(architecture.symmetry.tensors_of(inside)) | biases


def fit_projection(gram: Tensor, moments: Tensor, start: Tensor, ridge: float) -> Tensor:
    """The projection that maps the inputs nearest to the outputs, pulled towards ``start``; in float64.

    Args:
        gram: X^T X / rows, float64 [inputs, inputs].
        moments: X^T Y / rows, float64 [inputs, outputs].
        start: W_0, float64 [inputs, outputs].
        ridge: mu relative to the mean of the diagonal of ``gram``.
    """
    mean = float(gram.diagonal().mean())
    if mean == 0:  # nothing ever goes in
        return start.clone()
    regular = gram.clone()
    regular.diagonal().add_(ridge * mean)
    # Only what departs from the start is solved for: it is what the ridge pulls at.
    fitted: Tensor = start + torch.linalg.solve(regular, moments - gram @ start)
    return fitted
