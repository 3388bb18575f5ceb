"""``lossless_pruning``: layers, heads and hidden units that add nothing are taken away."""

from unmergeable.attacks.lossless_pruning.lossless_pruning import LosslessPruning, lossless_pruning

__all__ = ["LosslessPruning", "lossless_pruning"]
