"""Which tensor axis lives in which basis: symmetry maps, and one declaration for each family."""

from unmergeable.architecture.architecture import Architecture
from unmergeable.architecture.blocks import Attention, FeedForward, Mixture
from unmergeable.architecture.detect import detect
from unmergeable.architecture.families import FAMILIES
from unmergeable.architecture.symmetry import Group, Leg, Space, Stack, SymmetryMap

__all__ = [
    "FAMILIES",
    "Architecture",
    "Attention",
    "FeedForward",
    "Group",
    "Leg",
    "Mixture",
    "Space",
    "Stack",
    "SymmetryMap",
    "detect",
]
