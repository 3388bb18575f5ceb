"""``unmergeable map``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmergeable.cli.command import Outcome, working

if TYPE_CHECKING:
    from unmergeable.ops.map import MapResult


def map_(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, its config.json, hub:OWNER/NAME, or a model type.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the map as JSON; the file must not exist.")
    ] = None,
) -> Outcome:
    """Derive and prove a network's symmetry map.

    That is which changes of basis its weights allow. Builds a small random network from the config (no weights are
    read), watches where its heads and hidden units lie, and keeps the groups under which its outputs stay the same to
    1e-9 while a control changes them.

    Put the map into a folder named by UNMERGEABLE_MAPS, and every command knows the model type.

    Example:
      unmergeable map granite --out granite.json
    """
    with working(context):
        from unmergeable import ops

        result = ops.derive_map(model, out=out)
    return Outcome(result.to_json(), describe(result))


def describe(result: MapResult) -> list[str]:
    """Blocks, what was left alone, and the proof."""
    derived = result.derived
    lines = [f"{derived.model_type} ({derived.network_class})"]
    lines += [f"  attention {template['name']}: {_groups(template)}" for template in derived.attentions]
    lines += [f"  feed-forward {template['name']}" for template in derived.feed_forwards]
    lines += [f"Left alone: {name} ({reason})" for name, reason in derived.reasons.items()]
    lines += [f"Proven with transformers {derived.proof['transformers']}:"]
    for kind, figures in derived.proof["groups"].items():
        lines += [
            f"  {kind}: outputs change by {figures['change']:.0e}; with one side left alone {figures['one_sided']:.0e}"
        ]
    return [*lines, f"Map: {result.out}"] if result.out else lines


def _groups(template: Mapping[str, Any]) -> str:
    kinds = [f"{part['rotary']} rotary pairs" if part["rotary"] else "no positions" for part in template["parts"]]
    scores = " and ".join(kinds) if kinds else "queries and keys left alone"
    return f"{scores}; values: {template['value_group']}"
