"""What is done when nothing else is asked for; without imports, so that ``--help`` can say it."""

from collections.abc import Mapping

DEFAULT_METHOD = "gauge"
DEFAULT_SETTINGS: Mapping[str, object] = {"quantisation_friendly": True, "rotation": "fast"}
"""Of the default method: orthogonal changes only, which keep 4-bit formats as good as they were, and fast ones.

Whoever names ``gauge`` gets its own defaults.
"""
