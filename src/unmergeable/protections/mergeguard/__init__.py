"""MergeGuard: the method, and its two expensive parts, training (:mod:`.dispersal`) and the ranking of layers."""

from unmergeable.protections.mergeguard.method import MergeGuard

__all__ = ["MergeGuard"]
