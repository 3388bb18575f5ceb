"""How far `nearest_orbit` reaches on real weights: planted keys under task vectors of growing size.

    python benchmarks/recovery_limits.py CHECKPOINT [--shares 0.001 0.01 0.1 0.3 1]

CHECKPOINT is the base, any supported model (the committed figures are SmolLM2-135M in bfloat16). Its expert is the
base plus random numbers of a share of each tensor's norm, rounded to the stored dtype; a random key hides every order
and every basis inside the blocks, and with ``whole`` the residual stream and the gains of its norms too. All is held in
memory. Prints one JSON object: for each share the distance to the base of the unprotected expert, of the protected one
and after the attack, how many heads and hidden units are not back in their places, and CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from unmergeable.architecture.symmetry import Role
from unmergeable.attacks import Estimate, NearestOrbit
from unmergeable.attacks.distance import block_distances, relative_distance
from unmergeable.gauge.act import origins, transform_all
from unmergeable.gauge.elements import compose
from unmergeable.gauge.gauge import Gauge, sampled_gauge
from unmergeable.gauge.groups import identity
from unmergeable.ops.opened import open_with_architecture
from unmergeable.randomness import Stream

INSIDE: tuple[Role, ...] = ("query_key", "value_output", "heads", "feed_forward", "experts")
WHOLE: tuple[Role, ...] = (*INSIDE, "residual", "norm")
CONDITION = 4.0


class InMemory:
    """A checkpoint whose tensors are those of ``source`` after a function of name and tensor; a ``TensorSource``."""

    def __init__(self, source: Any, tensors: dict[str, torch.Tensor]) -> None:
        self._source, self._tensors = source, tensors
        self.description, self.config, self.index, self.folder = "protected", source.config, source.index, source.folder
        self.names, self.spec = source.names, source.spec

    def tensor(self, name: str) -> torch.Tensor:
        """A copy, as reading a file gives one."""
        return self._tensors[name].clone()


def expert_of(base: Any, share: float) -> dict[str, torch.Tensor]:
    """The base plus a random task vector."""
    tensors = {}
    for name in base.names:
        weight = base.tensor(name)
        seed = int.from_bytes(Stream.from_seed(0).child(name).key[:7], "little")
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        tensors[name] = (weight.float() + noise * (share * weight.float().norm() / noise.norm())).to(weight.dtype)
    return tensors


def misplaced(key: Gauge, estimate: Estimate, symmetry: Any) -> tuple[int, int]:
    """Heads, hidden units and tensors of experts that are not back in their places, and how many there are."""
    wrong, count = len(origins(symmetry, [key, *estimate.gauges])), sum(len(stack.members) for stack in symmetry.stacks)
    for gauge in estimate.gauges:
        for name, space in gauge.spaces.items():
            if space.role in ("heads", "feed_forward") and space.group.kind == "permutation":
                returned, home = compose(gauge[name], key[name]), identity(space)
                wrong += int((returned.index != home.index).sum())
                count += space.size
    return wrong, count


def measure(base: Any, architecture: Any, share: float, roles: tuple[Role, ...]) -> dict[str, Any]:
    """One planted key."""
    symmetry = architecture.symmetry
    tensors = expert_of(base, share)
    unprotected = relative_distance(block_distances(InMemory(base, tensors), base, architecture))
    key = sampled_gauge(symmetry.select(*roles), Stream.from_seed(1), CONDITION)
    hidden = transform_all(tensors, symmetry, [key])
    began = time.process_time()
    estimate = NearestOrbit().estimate(InMemory(base, hidden), base, architecture)
    seconds = time.process_time() - began
    wrong, count = misplaced(key, estimate, symmetry)
    return {
        "share": share,
        "key": "whole" if roles == WHOLE else "inside blocks",
        "unprotected": unprotected,
        "protected": estimate.before,
        "recovered": estimate.after,
        "ratio": estimate.after / unprotected,
        "misplaced": wrong,
        "orders": count,
        "confidence": estimate.confidence,
        "least_margin": min((fit.margin for fit in estimate.fits if fit.margin is not None), default=None),
        "cpu": seconds,
    }


def main() -> None:
    """Measure every share, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.001, 0.01, 0.1, 0.3, 1.0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base, architecture = open_with_architecture(arguments.checkpoint)
    rows = [
        measure(base, architecture, share, roles)
        for roles in (INSIDE, WHOLE)
        for share in arguments.shares
        if roles == INSIDE or share <= 0.3
    ]
    print(json.dumps({"model_type": architecture.family, "condition": CONDITION, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
