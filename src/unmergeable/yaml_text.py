"""YAML from anybody: whatever the reader raises becomes one line."""

from __future__ import annotations

from typing import Any

from unmergeable.errors import BadInput, UsageError

LONGEST_REASON = 500
"""Characters of what the reader says, which may quote the document."""


def parse_yaml(text: str, where: str, loader: Any = None) -> object:
    """The document in a text; ``loader`` is a class of PyYAML, by default its ``SafeLoader``.

    Raises:
        UsageError: PyYAML is not installed.
        BadInput: it is no YAML, or holds several documents, or dates or numbers that are none, or is nested too deeply.
    """
    try:
        import yaml
    except ModuleNotFoundError:
        raise UsageError(
            f"{where}: YAML needs PyYAML; run python -m pip install pyyaml, or write it as .json."
        ) from None
    try:
        return yaml.load(text, Loader=loader or yaml.SafeLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]} …"
        raise BadInput(f"{where} is not valid YAML: {reason}; correct it there.") from None
