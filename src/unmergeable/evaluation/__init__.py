"""Audits: protections against an attacker who knows about them, and the worst case on one page.

The road is in :mod:`unmergeable.evaluation.run`, the measure in :mod:`unmergeable.evaluation.worst_case`.
"""
