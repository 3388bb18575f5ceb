"""``unmergeable methods``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from unmergeable.cli.command import Outcome, working

if TYPE_CHECKING:
    from unmergeable.ops.methods import MethodEntry, MethodsResult


def methods(context: typer.Context) -> Outcome:
    """List every protection, merge and recovery, and their settings.

    Also what each family of models leaves to an exact protection. No exact protection stops somebody who holds the base
    model.

    Example:
      unmergeable methods
    """
    with working(context):
        from unmergeable import ops

        result = ops.methods()
    return Outcome(result.to_json(), describe(result))


def describe(result: MethodsResult) -> list[str]:
    """The lists as text, one line or two each."""
    lines = []
    for title, entries in (
        ("Protections", result.protections),
        ("Controls (they protect nothing, and an audit must find that out)", result.controls),
        ("Merges", result.merges),
        ("Recoveries", result.recoveries),
    ):
        lines += [title, *_entries(entries), ""]
    lines += ["Families of models, by the changes of basis they allow between queries and keys"]
    for group in dict.fromkeys(result.families.values()):
        names = ", ".join(name for name, allowed in result.families.items() if allowed == group)
        lines += [f"  {group}", f"    {names}"]
    return lines


def _entries(entries: Sequence[MethodEntry]) -> list[str]:
    width = max((len(entry.name) for entry in entries), default=0)
    lines = []
    for entry in entries:
        facts = ["exact"] if entry.exact else []
        facts += [f"needs {', '.join(entry.needs)}"] if entry.needs else []
        note = f" ({'; '.join(facts)})" if facts else ""
        lines += [f"  {entry.name:<{width}}  {entry.summary}{note}"]
        settings = ", ".join(f"{setting.name}={setting.default}" for setting in entry.settings)
        lines += [f"  {'':<{width}}  settings: {settings}"] if settings else []
    return lines
