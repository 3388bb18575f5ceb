"""Names that an audit gives by itself: to models that every audit has, and to what it makes."""

BASE = "base"
"""What everything was fine-tuned from, among the models that are scored alone."""

IDENTITY, SCALE = "identity", "scale"
PLANTED, PLANTED_STRUCTURE = "planted", "planted_structure"
NOTHING = "nothing"

CONTROLS = (IDENTITY, SCALE, PLANTED, PLANTED_STRUCTURE, NOTHING)
"""The controls (:mod:`unmergeable.evaluation.control_models`). None protects: an audit must find that out."""

NOT_THE_EXPERT = tuple(name for name in CONTROLS if name != IDENTITY)
"""Those of merging alone: no student is made of them, and nothing is trained into them."""

GIVEN = "given recovery"
"""Weights that somebody else got out of a release."""
