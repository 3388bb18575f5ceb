"""What weights look like from outside: connectivity, sensitivity, sharpness, distances, planes of weights.

Numbers only; pictures are drawn elsewhere. Most figures depend on the basis the weights are written in: measure them
raw, and on the canonical weights.
"""

from unmergeable.evaluation.analysis.canonical import CanonicalSource, canonical_source
from unmergeable.evaluation.analysis.curve import Curve, barrier, connectivity, scaling
from unmergeable.evaluation.analysis.noise import NoiseSensitivity, noise_sensitivity
from unmergeable.evaluation.analysis.parts import PartGram, part_grams, taken_together
from unmergeable.evaluation.analysis.plane import (
    Landscape,
    Place,
    Plane,
    grid,
    landscape,
    plane_through,
    principal_plane,
    task_vector_gram,
)
from unmergeable.evaluation.analysis.scored import Backpropagate, Score, Scored, backpropagate_task, score_task
from unmergeable.evaluation.analysis.sharpness import Sharpness, sharpness

__all__ = [
    "Backpropagate", "CanonicalSource", "Curve", "Landscape", "NoiseSensitivity", "PartGram", "Place", "Plane",
    "Score", "Scored", "Sharpness", "backpropagate_task", "barrier", "canonical_source", "connectivity", "grid",
    "landscape", "noise_sensitivity", "part_grams", "plane_through", "principal_plane", "scaling", "score_task",
    "sharpness", "taken_together", "task_vector_gram",
]  # fmt: skip
