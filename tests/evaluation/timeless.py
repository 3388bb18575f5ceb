"""Results of audits, to be compared."""

from __future__ import annotations

from typing import Any

from unmergeable.evaluation.records import Record


def timeless(document: Any) -> Any:
    """As JSON, without what differs from run to run by its nature."""
    if isinstance(document, Record):
        return timeless(document.to_json())
    if isinstance(document, dict):
        return {key: timeless(value) for key, value in document.items() if "cpu_seconds" not in key}
    return [timeless(item) for item in document] if isinstance(document, list) else document
