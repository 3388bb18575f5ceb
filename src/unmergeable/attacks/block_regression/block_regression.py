"""``block_regression``: the base's layers, changed as little as will make them compute what the release's compute.

Whatever was done to a release, it runs; and what its layers add to the residual stream, the next ones have to read. The
attacker sends inputs of his own through the release as it is, in its own structure, and through the base, and then
makes the base the release, from the first layer to the last:

    map        A, c   the release's stream to the base's, the smallest kind of map that does (``stream_map``)
    layers     which place between layers of the release belongs to which of the base's: the most alike, in order
    embedding  tables mapped where the release has them, and moved on until the stream is the release's, mapped
    layer l    moved from the base's weights until the stream behind it, on *its own* stream so far, is the release's
    output     what comes behind the last layer, until outputs are the release's

Each step is a least-squares problem with a pull towards the start (``fitting``). Norms and scales are the base's all
the way. Nothing is assumed about bases, trades, orders, idle or split layers, widths or polynomials: they show in no
stream.

What it cannot know is what no input speaks of, and what the map takes for a change of basis. With no data the inputs
are random tokens or noise images. A release that is no fine-tune of the base leaves most of the base's stream
unexplained, and is not recognised.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from unmergeable.attacks.base import NOT_RECOGNISED, AttackRequirements, Finding, Inputs, Recovered
from unmergeable.attacks.block_regression.inputs import complete, drawn
from unmergeable.attacks.block_regression.regression import RegressionResult, block_regression
from unmergeable.attacks.live import edits_to, load, state_for
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import UsageError
from unmergeable.network.disk_weights import find_places, show
from unmergeable.progress import Progress, silent


@dataclass(frozen=True)
class BlockRegression:
    """Settings of the attack.

    Attributes:
        examples: the most that are read, or how many are drawn without data.
        ridge: pull of each layer towards the base.
        steps: of each layer.
        seed: of the examples.
    """

    name: ClassVar[str] = "block_regression"
    summary: ClassVar[str] = "the base's layers, moved until they compute what the release's layers compute"

    examples: int = 512
    ridge: float = 1e-2
    steps: int = 12
    seed: int = 0

    def validate(self) -> None:
        if not 0 <= self.ridge < math.inf:
            raise UsageError(f"ridge={self.ridge}: must be zero or positive.")
        for name in ("examples", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: at least one is needed.")

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(needs=("base",), accepts=("data",), structure="any")

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Fit the base to the release, layer by layer; the result has the base's structure.

        Raises:
            UsageError: the examples come with a head, which would not be read; or none can be drawn for the network.
            BadInput: the examples cannot be used, or the release has no layers that could be followed.
        """
        if inputs.data is not None and inputs.data.head is not None:
            raise UsageError("block_regression looks at the network itself, and reads no head; leave out --head.")
        template = inputs.protected if _is_alike(inputs.protected, inputs.base) else inputs.base
        student, teacher = load(template), load(inputs.protected)
        show(find_places(student), state_for(student, inputs.base))
        if inputs.data is None:
            task = drawn(student, examples=self.examples, seed=self.seed)
        else:
            task = inputs.data.unlabelled(examples=self.examples, seed=self.seed)
        result = block_regression(
            student,
            teacher,
            inputs.architecture,
            complete(student, task),
            tables=state_for(student, inputs.protected),
            ridge=self.ridge,
            steps=self.steps,
            progress=progress,
        )
        findings: dict[str, Finding] = {} if result.is_recognised else {"result": NOT_RECOGNISED}
        learnt = Regressed(None if inputs.data is None else inputs.data.path, task.name, result)
        return Recovered(template, edits_to(result.weights, template), findings=findings, learnt=learnt)


def _is_alike(release: TensorSource, base: TensorSource) -> bool:
    """Whether the release has all of the base's tensors in their shapes, so that it may lend its head and its files."""
    held = set(release.names)
    return all(name in held and release.spec(name).shape == base.spec(name).shape for name in base.names)


@dataclass(frozen=True)
class Regressed:
    """How near the layers came; ``data`` None where inputs were drawn."""

    data: Path | None
    inputs: str
    result: RegressionResult

    def to_json(self) -> dict[str, Any]:
        result = self.result
        return {
            "data": None if self.data is None else str(self.data),
            "inputs": self.inputs,
            "streams": [
                {"map": item.kind, "unexplained": item.unexplained, "layers": list(places)}
                for item, places in zip(result.maps, result.places, strict=True)
            ],
            "fits": [asdict(fit) for fit in result.fits],
        }

    def lines(self) -> list[str]:
        result = self.result
        lines = [f"Inputs: {self.inputs}"]
        for item in result.maps:
            lines.append(f"Stream: map {item.kind}; unexplained of the base's stream: {item.unexplained:.3g}")
        if result.fits:
            before, after = result.median("before"), result.median("after")
            lines.append(
                f"Fitted {len(result.fits)} layers: distance of what they put out to the release's, relative to what "
                f"they add, {before:.3g} before, {after:.3g} after (median)"
            )
        return lines
