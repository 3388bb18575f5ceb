"""What an attacker who holds the base does to a protected checkpoint before merging it, one file for each method.

Each method is a class of settings, which works on checkpoints, and a function of the same name in lower case, which
works on state dicts or live networks: :mod:`unmergeable.attacks.in_memory` says how to call it.
"""

from __future__ import annotations

from unmergeable.attacks.base import Attack, AttackRequirements, Estimate, Fit, Inputs, Learnt, Recovered, Whose
from unmergeable.attacks.block_regression import BlockRegression, block_regression
from unmergeable.attacks.canonicalise import Canonicalise, canonicalise
from unmergeable.attacks.diagonal_ratio import DiagonalRatio, diagonal_ratio
from unmergeable.attacks.distance import Distance, relative_distance
from unmergeable.attacks.distil import Distil, distil
from unmergeable.attacks.estimate import GaugeAttack
from unmergeable.attacks.few_shot import FewShot, few_shot
from unmergeable.attacks.grad_erase import GradErase, grad_erase
from unmergeable.attacks.in_memory import OrbitFit, RecoveredWeights, distances
from unmergeable.attacks.kabsch import Kabsch, kabsch
from unmergeable.attacks.layerwise_ridge import LayerwiseRidge, layerwise_ridge
from unmergeable.attacks.lossless_pruning import LosslessPruning, lossless_pruning
from unmergeable.attacks.nearest_orbit import NearestOrbit, nearest_orbit
from unmergeable.attacks.neuron_matching import NeuronMatching, neuron_matching
from unmergeable.attacks.revert_to_base import RevertToBase, revert_to_base
from unmergeable.attacks.source_subtraction import SourceSubtraction, source_subtraction
from unmergeable.attacks.task_vector_rescale import TaskVectorRescale, task_vector_rescale
from unmergeable.attacks.taylor_inversion import TaylorInversion, taylor_inversion
from unmergeable.attacks.unmask import Unmask, unmask
from unmergeable.registry import Registry

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackRequirements",
    "BlockRegression",
    "Canonicalise",
    "DiagonalRatio",
    "Distance",
    "Distil",
    "Estimate",
    "FewShot",
    "Fit",
    "GaugeAttack",
    "GradErase",
    "Inputs",
    "Kabsch",
    "LayerwiseRidge",
    "Learnt",
    "LosslessPruning",
    "NearestOrbit",
    "NeuronMatching",
    "OrbitFit",
    "Recovered",
    "RecoveredWeights",
    "RevertToBase",
    "SourceSubtraction",
    "TaskVectorRescale",
    "TaylorInversion",
    "Unmask",
    "Whose",
    "block_regression",
    "canonicalise",
    "diagonal_ratio",
    "distances",
    "distil",
    "few_shot",
    "grad_erase",
    "kabsch",
    "layerwise_ridge",
    "lossless_pruning",
    "nearest_orbit",
    "neuron_matching",
    "register_attack",
    "relative_distance",
    "revert_to_base",
    "source_subtraction",
    "task_vector_rescale",
    "taylor_inversion",
    "unmask",
]

ATTACKS = Registry(
    "recovery",
    "unmergeable.attacks",
    (
        NearestOrbit,
        Canonicalise,
        LosslessPruning,
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
        BlockRegression,
        GradErase,
        Distil,
    ),
)
"""Every attack by name: these, and those of other packages."""

register_attack = ATTACKS.register
