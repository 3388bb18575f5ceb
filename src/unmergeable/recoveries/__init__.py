"""What an attacker who holds the base does to a protected checkpoint before merging it, one file for each method."""

from __future__ import annotations

from unmergeable.recoveries.diagonal_ratio import DiagonalRatio
from unmergeable.recoveries.few_shot import FewShot
from unmergeable.recoveries.grad_erase import GradErase
from unmergeable.recoveries.kabsch import Kabsch
from unmergeable.recoveries.layerwise_ridge import LayerwiseRidge
from unmergeable.recoveries.nearest_orbit import NearestOrbit
from unmergeable.recoveries.neuron_matching import NeuronMatching
from unmergeable.recoveries.recovery import Estimate, Fit, Inputs, Recovered, Recovery, WeightRecovery
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
    "FewShot",
    "Fit",
    "GradErase",
    "Inputs",
    "Kabsch",
    "LayerwiseRidge",
    "NearestOrbit",
    "NeuronMatching",
    "Recovered",
    "Recovery",
    "RevertToBase",
    "SourceSubtraction",
    "TaskVectorRescale",
    "TaylorInversion",
    "Unmask",
    "WeightRecovery",
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
        FewShot,
        LayerwiseRidge,
        GradErase,
    )
}

OF_ANY_STRUCTURE = frozenset({RevertToBase.name, TaylorInversion.name})
"""Recoveries of checkpoints whose layers are no longer the base's; the others need a family with a symmetry map."""

MAY_READ_SOURCES = frozenset({FewShot.name})
"""Recoveries that do without sources and make use of them."""
