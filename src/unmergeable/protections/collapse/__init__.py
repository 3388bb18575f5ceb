"""collapse: the method, and its training (:mod:`.training`)."""

from unmergeable.protections.collapse.method import Collapse

__all__ = ["Collapse"]
