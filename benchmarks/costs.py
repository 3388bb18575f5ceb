"""The table of docs/costs.md: what commands cost at four sizes, from what was measured at one.

    python -m benchmarks.costs        prints the tables

Seconds are processor time of one thread after the start of the program, memory the peak of the process. What was
measured stands in ``benchmarks/results``; the rest is computed from it:

    passes over the files     seconds go with the number of weights
    a dense rotation          and with the width of the stream
    a fast rotation           a twentieth of a dense one at 4096, and then with the logarithm of the width
    nearest_orbit             layers x intermediate_size^2 x hidden_size: the similarities of hidden units
    its memory                intermediate_size^2: the matrix of similarities of one layer
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """A Llama's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    is_tied: bool = False

    @property
    def weights(self) -> float:
        """In billions; the gains of norms are next to nothing."""
        attention = 2 * self.hidden**2 * (1 + self.key_value_heads / self.heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return (self.layers * layer + (2 - self.is_tied) * self.vocabulary * self.hidden) / 1e9

    @property
    def similarities(self) -> float:
        return self.layers * self.intermediate**2 * self.hidden


SHAPES: Mapping[str, Shape] = {
    "SmolLM2-360M": Shape(960, 2560, 32, 15, 5, 49152, is_tied=True),
    "TinyLlama-1.1B": Shape(2048, 5632, 22, 32, 4, 32000),
    "Llama-3.1-8B": Shape(4096, 14336, 32, 32, 8, 128256),
    "Llama-3.1-70B": Shape(8192, 28672, 80, 64, 8, 128256),
}
MEASURED_MERGE = MEASURED_ATTACK = SHAPES["TinyLlama-1.1B"]

# Of a Llama of 0.307 billion weights and width 2048, as docs/protections.md has them.
GAUGE_WITHOUT_STREAM, DENSE_ROTATION, GAUGE_WEIGHTS, GAUGE_WIDTH = 4.0, 14.0, 0.307, 2048
FAST_SHARE, FAST_WIDTH = 1 / 20, 4096

START_GIGABYTES = 0.3
"""Of a process that has loaded torch and works on next to nothing."""


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def mergelock_seconds(shape: Shape) -> float:
    """The median of the rounds that were measured, by weight."""
    measured = _result("protect_speed")
    seconds = sorted(round_["cpu"] for round_ in measured["rounds"]["protect"])
    return float(seconds[len(seconds) // 2] / (measured["bytes"] / 2e9) * shape.weights)


def gauge_seconds(shape: Shape, *, rotation: str) -> float:
    """Without the stream, and with its rotation."""
    by_weight = shape.weights / GAUGE_WEIGHTS
    dense = DENSE_ROTATION * by_weight / GAUGE_WIDTH
    if rotation == "dense":
        return GAUGE_WITHOUT_STREAM * by_weight + dense * shape.hidden
    at_4096 = dense * FAST_WIDTH * FAST_SHARE
    return GAUGE_WITHOUT_STREAM * by_weight + at_4096 * math.log2(shape.hidden) / math.log2(FAST_WIDTH)


def merge_seconds(shape: Shape) -> float:
    """Two models and the base."""
    linear = _result("merge_speed")["methods"]["linear"]["ways"]["ours"]
    return float(linear["work_cpu"] / MEASURED_MERGE.weights * shape.weights)


def attack_seconds(shape: Shape) -> float:
    """The whole of ``nearest_orbit``, its file written."""
    return float(_result("recovery_cost")["recover"]["cpu"] * shape.similarities / MEASURED_ATTACK.similarities)


def attack_gigabytes(shape: Shape) -> float:
    """The more of the whole command and of one feed-forward of this width, by the one that was measured at 14336."""
    measured = _result("recovery_cost")
    (wide,) = (one for one in measured["assignments"] if one["width"] == 14336 and one["planted"])
    return max(
        measured["recover"]["peak_rss_mb"] / 1e3 if shape.hidden >= MEASURED_ATTACK.hidden else START_GIGABYTES,
        wide["peak_rss_mb"] / 1e3 * (shape.intermediate / 14336) ** 2,
    )


def protect_gigabytes() -> float:
    """Of ``mergelock``, at the widths of an 8-billion Llama."""
    return float(max(one["peak_rss_mb"] for one in _result("protect_speed")["rounds"]["protect"])) / 1e3


def merge_gigabytes() -> float:
    return float(_result("merge_speed")["methods"]["linear"]["ways"]["ours"]["peak_mb"]) / 1e3


def table() -> str:
    """In Markdown; bold is what was measured at that size or nearly."""
    rows = {
        "weights, and disk for OUT in bfloat16": [
            f"{shape.weights:.2g} B, {_gigabytes(2 * shape.weights)}" for shape in SHAPES.values()
        ],
        "`protect --method mergelock`": [_time(mergelock_seconds(shape)) for shape in SHAPES.values()],
        "`protect` (the default), and its `restore`": [
            _time(gauge_seconds(shape, rotation="fast")) for shape in SHAPES.values()
        ],
        "`protect --method gauge`, and its `restore`": [
            _time(gauge_seconds(shape, rotation="dense")) for shape in SHAPES.values()
        ],
        "`merge --method linear`, two models": [
            f"**{_time(merge_seconds(shape))}**" if shape == MEASURED_MERGE else _time(merge_seconds(shape))
            for shape in SHAPES.values()
        ],
        "`recover --method nearest_orbit`": [
            f"**{text}**" if shape == MEASURED_ATTACK else text
            for shape in SHAPES.values()
            for text in [f"{_time(attack_seconds(shape))}, {_gigabytes(attack_gigabytes(shape))}"]
        ],
    }
    lines = [f"| command | {' | '.join(SHAPES)} |", "|" + "---|" * (1 + len(SHAPES))]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


LARGE_BYTES = 1.342e12
"""671 billion weights in bfloat16."""


def shared_table() -> str:
    """What ``protect --ray`` cost as measured, and what by that 671 billion weights would; in Markdown."""
    measured = _result("protect_on_ray")
    lines = [
        "| | measured | processor time | read | written | computed for 671 B: processor time | read | written |",
        "|---" * 8 + "|",
    ]
    for run in measured["runs"]:
        workers = run["workers"]
        name = "no cluster, one thread" if workers is None else f"{workers} worker{'s' if workers > 1 else ''}"
        times = LARGE_BYTES / measured["bytes"]
        moved = [run["bytes_read"], run["bytes_written"]]
        cells = [
            _gigabytes(measured["bytes"] / 1e9),
            _time(run["cpu_seconds"]),
            *(_gigabytes(nbytes / 1e9) for nbytes in moved),
            _time(run["cpu_seconds"] * times),
            *(_gigabytes(nbytes * times / 1e9) for nbytes in moved),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 6000 else f"{seconds / 3600:.2g} h"


def _gigabytes(value: float) -> str:
    return f"{value:.2g} GB" if value < 100 else f"{value:.0f} GB"


if __name__ == "__main__":
    print(table(), shared_table(), sep="\n\n")
