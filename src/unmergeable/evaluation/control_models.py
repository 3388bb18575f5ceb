"""Models that an audit makes to check itself, and what it knows of them that an attacker does not.

identity           the expert itself                             nothing is protected
scale              base + 0.65 (expert - base)                   larger coefficients undo it
planted            the expert in another exact form, drawn       every recovery of bases, constants and scales needed
planted_structure  the same in another structure as well         whatever was put in the way has to go
nothing            the base, as if it were a release             it has nothing that could be stolen
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save

from unmergeable import ops
from unmergeable.attacks.distance import block_distances, relative_distance
from unmergeable.checkpoint.disk import write_file
from unmergeable.checkpoint.open import open_checkpoint
from unmergeable.errors import BadInput, UnmergeableError
from unmergeable.evaluation.names import PLANTED, PLANTED_STRUCTURE
from unmergeable.evaluation.planted import KINDS, STRUCTURES, planted
from unmergeable.network.logits import logit_gap
from unmergeable.ops.opened import open_base, open_with_architecture

SCALE_FACTOR = 0.65

KINDS_OF: Mapping[str, Sequence[str]] = {
    PLANTED: tuple(kind for kind in KINDS if kind not in STRUCTURES),
    PLANTED_STRUCTURE: KINDS,
}
"""What is planted under each name."""


def write_planted(expert: Path, base: Path, out: Path, kinds: Sequence[str], seed: int) -> dict[str, Any]:
    """Write an exact rewrite of ``expert`` to the folder ``out``, which must not exist; it is held in memory.

    Returns:
        ``planted``: the kinds of rewrites that its family has and that were made; and what :func:`output_gap` gives.

    Raises:
        BadInput: the expert cannot be rewritten.
        DiskError: it cannot be written.
    """
    source, architecture = open_with_architecture(expert, base=base)
    drawn = planted(source, architecture, seed, kinds)
    if not drawn.kinds:
        raise BadInput(f"{architecture.family}: no exact rewrite of {', '.join(kinds)} is known.")
    out.mkdir(parents=True)
    write_file(out / "model.safetensors", save(dict(drawn.source.tensors), metadata={"format": "pt"}))
    write_file(out / "config.json", json.dumps(dict(drawn.source.config), indent=1).encode())
    return {"planted": list(drawn.kinds), **output_gap(expert, out, base)}


def distance_with_key(release: Path, key: Path, expert: Path, base: Path) -> float | None:
    """How far from the base the owner gets with the key, in units of the expert's own distance.

    More than 1 only by the rounding of what was stored: no attacker can be asked for less. None where the expert is the
    base.
    """
    with TemporaryDirectory(prefix="unmergeable-") as folder:
        restored = Path(folder, "restored")
        ops.restore(release, key=key, out=restored)
        distances = []
        for checkpoint in (restored, expert):
            source, architecture = open_with_architecture(checkpoint, base=base)
            origin = open_base(base, source, architecture)
            distances.append(relative_distance(block_distances(source, origin, architecture)))
    return distances[0] / distances[1] if distances[1] else None


def output_gap(expert: Path, release: Path, base: Path, condition: float = 1.0) -> dict[str, float | None]:
    """How far the outputs of a release lie from the expert's on random inputs, and how far rounding moves them.

    Args:
        expert: as it was.
        release: of any structure that can be loaded.
        base: of both, in case they are adapters.
        condition: condition number that may separate them.

    Returns:
        ``output_gap`` and ``output_gap_bound``, relative; the gap is None where the two cannot be compared.
    """
    try:
        first, second = (open_checkpoint(checkpoint, base=base) for checkpoint in (expert, release))
        found = logit_gap(first, second, condition, is_requested=True, is_measured=True)
    except (UnmergeableError, RuntimeError, ValueError):  # outputs of other shapes, a network that cannot be built
        return {"output_gap": None, "output_gap_bound": None}
    return {"output_gap": found.gap, "output_gap_bound": found.bound}
