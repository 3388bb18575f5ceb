"""What is done when nothing else is asked for; without imports, so that ``--help`` can say it."""

from collections.abc import Mapping

DEFAULT_METHOD = "gauge"
DEFAULT_SETTINGS: Mapping[str, object] = {"quantisation_friendly": True}
"""Of the default method: no off-the-shelf merge of the audits got through, and 4-bit formats stay as good as they were.

Whoever names ``gauge`` gets its own defaults.
"""
