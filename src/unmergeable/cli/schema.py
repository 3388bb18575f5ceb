"""``unmergeable schema``."""

from __future__ import annotations

import json

import typer

from unmergeable.cli.command import Outcome, working


def schema(context: typer.Context) -> Outcome:
    """Print the JSON Schema of recipe files.

    With every protection and its settings; editors check a recipe against it.

    Example:
      unmergeable schema > recipe.schema.json
    """
    with working(context):
        from unmergeable import ops

        document = ops.schema()
    return Outcome(document, [json.dumps(document, indent=2)])
