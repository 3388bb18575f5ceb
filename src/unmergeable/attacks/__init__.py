"""What an attacker who holds the base does to a protected checkpoint before merging it, one file for each method."""

from __future__ import annotations

from unmergeable.attacks.base import Attack, Estimate, Fit, Inputs, Recovered, WeightAttack
from unmergeable.attacks.canonicalise import Canonicalise
from unmergeable.attacks.diagonal_ratio import DiagonalRatio
from unmergeable.attacks.few_shot import FewShot
from unmergeable.attacks.grad_erase import GradErase
from unmergeable.attacks.kabsch import Kabsch
from unmergeable.attacks.layerwise_ridge import LayerwiseRidge
from unmergeable.attacks.nearest_orbit import NearestOrbit
from unmergeable.attacks.neuron_matching import NeuronMatching
from unmergeable.attacks.revert_to_base import RevertToBase
from unmergeable.attacks.source_subtraction import SourceSubtraction
from unmergeable.attacks.task_vector_rescale import TaskVectorRescale
from unmergeable.attacks.taylor_inversion import TaylorInversion
from unmergeable.attacks.unmask import Unmask

__all__ = [
    "ATTACKS",
    "OF_ANY_STRUCTURE",
    "Attack",
    "Canonicalise",
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
    "RevertToBase",
    "SourceSubtraction",
    "TaskVectorRescale",
    "TaylorInversion",
    "Unmask",
    "WeightAttack",
]

ATTACKS: dict[str, type[Attack]] = {
    cls.name: cls
    for cls in (
        NearestOrbit,
        Canonicalise,
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
