"""What an attacker who holds the base does to a protected checkpoint before merging it, one file for each method."""

from __future__ import annotations

from unmergeable.recoveries.diagonal_ratio import DiagonalRatio
from unmergeable.recoveries.kabsch import Kabsch
from unmergeable.recoveries.nearest_orbit import NearestOrbit
from unmergeable.recoveries.neuron_matching import NeuronMatching
from unmergeable.recoveries.recovery import Estimate, Fit, Inputs, Recovered, Recovery
from unmergeable.recoveries.revert_to_base import RevertToBase
from unmergeable.recoveries.source_subtraction import SourceSubtraction
from unmergeable.recoveries.task_vector_rescale import TaskVectorRescale
from unmergeable.recoveries.taylor_inversion import TaylorInversion
from unmergeable.recoveries.unmask import Unmask

__all__ = [
    "OF_ANY_STRUCTURE",
    "RECOVERIES",
    "DiagonalRatio",
    "Estimate",
    "Fit",
    "Inputs",
    "Kabsch",
    "NearestOrbit",
    "NeuronMatching",
    "Recovered",
    "Recovery",
    "RevertToBase",
    "SourceSubtraction",
    "TaskVectorRescale",
    "TaylorInversion",
    "Unmask",
]

RECOVERIES: dict[str, type[Recovery]] = {
    cls.name: cls
    for cls in (
        NearestOrbit,
        Kabsch,
        NeuronMatching,
        DiagonalRatio,
        RevertToBase,
        TaskVectorRescale,
        SourceSubtraction,
        TaylorInversion,
        Unmask,
    )
}

OF_ANY_STRUCTURE = frozenset({RevertToBase.name, TaylorInversion.name})
"""Recoveries of checkpoints whose layers are no longer the base's; the others need a family with a symmetry map."""
