"""Names that an audit gives by itself: to models that every audit has, and to what it makes."""

BASE = "base"
"""What everything was fine-tuned from, among the models that are scored alone."""

IDENTITY, SCALE = "identity", "scale"
"""The controls: the expert itself, and base + 0.65 (expert - base). Neither protects: an audit must find that out."""

GIVEN = "given recovery"
"""Weights that somebody else got out of a release."""
