"""``lossless_pruning``: layers, heads and hidden units that add nothing, taken away until the base's structure is left."""

from unmergeable.attacks.lossless_pruning.lossless_pruning import LosslessPruning, lossless_pruning

__all__ = ["LosslessPruning", "lossless_pruning"]
