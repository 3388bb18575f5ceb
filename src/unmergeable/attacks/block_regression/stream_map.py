"""The map from a release's stream to the base's, found from what both compute on the same inputs.

    A, c_l   minimise  sum over layers and places  |x A + c_l - y|^2 / |y|^2

x being the release's stream and y the base's. Between the base and a fine-tune of it y differs by what was learnt, and
a map with freedom to spare explains some of that away. So the smallest kind of map is taken that explains nearly as
much as the largest, on places that were not fitted: none at all, a permutation with signs, a rotation with one scale,
any matrix; each first without constants, then with one for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmergeable.gauge.assignment import best_assignment

NEARLY = 4.0
"""Times what the largest kind of map leaves unexplained."""

RIDGE = 1e-6
"""Of the largest kind, relative to the mean square of the stream."""


@dataclass(frozen=True)
class StreamMap:
    """``matrix`` [release's width, base's width]; ``constants`` [layers + 1, base's width]; what is ``unexplained`` on
    places that were not fitted, from 0 (all of the base's stream is there) to 1 (nothing) and beyond.

    ``kind``: the smallest that would do.
    """

    kind: str
    matrix: Tensor
    constants: Tensor
    unexplained: float

    def of(self, stream: Tensor, layer: int) -> Tensor:
        """The release's stream [rows, width] behind ``layer`` layers of the base (0: before the first), in its basis."""
        return stream @ self.matrix + self.constants[layer]


def find_map(release: Sequence[Tensor], base: Sequence[Tensor], *, is_centred: bool) -> StreamMap:
    """The map between streams [rows, width], layer by layer; ``is_centred``: what is alike in all coordinates of the
    base's is not seen, and left out.
    """
    scales = [_lengths(theirs, is_centred=is_centred) for theirs in base]
    ours = [stream / scale for stream, scale in zip(release, scales, strict=True)]
    theirs = [centre(stream, is_centred=is_centred) / scale for stream, scale in zip(base, scales, strict=True)]
    # Rows at even places are fitted, those at odd places judge.
    fitted = [(x[::2], y[::2]) for x, y in zip(ours, theirs, strict=True)]
    judged = [(x[1::2], y[1::2]) for x, y in zip(ours, theirs, strict=True)]
    whole = sum(float((y - y.mean(0)).square().sum()) for _, y in judged)
    found: list[StreamMap] = []
    for kind, solve in _KINDS.items():
        for has_constants in (False, True):
            middles = [
                (x.mean(0), y.mean(0)) if has_constants else (torch.zeros(x.shape[1]), torch.zeros(y.shape[1]))
                for x, y in fitted
            ]
            pairs = [(x - a, y - b) for (x, y), (a, b) in zip(fitted, middles, strict=True)]
            matrix = solve(pairs)
            if matrix is None:
                continue
            left = sum(
                float((centre((x - a) @ matrix, is_centred=is_centred) + b - y).square().sum())
                for (x, y), (a, b) in zip(judged, middles, strict=True)
            )
            constants = [
                (y.mean(0) - x.mean(0) @ matrix) if has_constants else torch.zeros(y.shape[1])
                for x, y in zip(release, base, strict=True)
            ]
            found.append(StreamMap(kind, matrix, torch.stack(constants), left / max(whole, 1e-30)))
    best = min(item.unexplained for item in found)
    return next(item for item in found if item.unexplained <= NEARLY * best + 1e-12)


def match_layers(release: Sequence[Tensor], base: Sequence[Tensor], *, is_centred: bool) -> tuple[int, ...]:
    """For every place between layers of the base one of the release's, in order, first to first and last to last.

    Where their numbers differ, those whose streams are most alike, by the map that the first and last pairs give.
    """
    if len(release) == len(base):
        return tuple(range(len(base)))
    ends = (0, -1)
    first = find_map([release[at] for at in ends], [base[at] for at in ends], is_centred=is_centred)
    mapped = [centre(stream @ first.matrix, is_centred=is_centred) for stream in release]
    wanted = [centre(stream, is_centred=is_centred) for stream in base]
    costs = torch.zeros(len(base), len(release), dtype=torch.float64)
    for row, y in enumerate(wanted):
        for column, x in enumerate(mapped):
            # Constants that differ are no difference here.
            away = (x - x.mean(0)) - (y - y.mean(0))
            costs[row, column] = (away.square().sum() / (y - y.mean(0)).square().sum().clamp_min(1e-30)).double()
    return _cheapest_path(costs)


def _cheapest_path(costs: Tensor) -> tuple[int, ...]:
    """Column for every row, never going back, from the first corner to the last, with the least sum."""
    rows, columns = costs.shape
    best = torch.full((rows, columns), torch.inf, dtype=torch.float64)
    best[0, 0] = costs[0, 0]
    for row in range(1, rows):
        best[row] = costs[row] + torch.cummin(best[row - 1], 0).values
    path = [columns - 1]
    for row in range(rows - 2, -1, -1):
        path.append(int(best[row, : path[-1] + 1].argmin()))
    return tuple(reversed(path))


def centre(stream: Tensor, *, is_centred: bool) -> Tensor:
    """Without what is alike in all coordinates, where nothing sees that."""
    return stream - stream.mean(-1, keepdim=True) if is_centred else stream


def _lengths(stream: Tensor, *, is_centred: bool) -> Tensor:
    lengths = centre(stream, is_centred=is_centred).norm(dim=-1, keepdim=True)
    return lengths.clamp_min(1e-6 * float(lengths.median()) + 1e-30)


Pairs = Sequence[tuple[Tensor, Tensor]]


def _moments(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """X^T X and X^T Y in float64."""
    gram = sum((x.double().T @ x.double() for x, _ in pairs), torch.zeros((), dtype=torch.float64))
    cross = sum((x.double().T @ y.double() for x, y in pairs), torch.zeros((), dtype=torch.float64))
    return gram, cross


def _identity(pairs: Pairs) -> Tensor | None:
    x, y = pairs[0]
    return torch.eye(x.shape[1]) if x.shape[1] == y.shape[1] else None


def _permutation(pairs: Pairs) -> Tensor | None:
    x, y = pairs[0]
    if x.shape[1] != y.shape[1]:
        return None
    gram, cross = _moments(pairs)
    norms = sum((y.double().square().sum(0) for _, y in pairs), torch.zeros((), dtype=torch.float64))
    alike = cross / (gram.diagonal()[:, None] * norms[None]).clamp_min(1e-30).sqrt()
    columns = best_assignment(alike.abs())
    matrix = torch.zeros_like(alike)
    rows = torch.arange(len(columns))
    matrix[rows, columns] = torch.where(alike[rows, columns] < 0, -1.0, 1.0).double()
    return matrix.float()


def _rotation(pairs: Pairs) -> Tensor | None:
    x, y = pairs[0]
    if x.shape[1] != y.shape[1]:
        return None
    gram, cross = _moments(pairs)
    left, values, right = torch.linalg.svd(cross)
    scale = values.sum() / gram.diagonal().sum().clamp_min(1e-30)
    return (scale * (left @ right)).float()


def _linear(pairs: Pairs) -> Tensor | None:
    gram, cross = _moments(pairs)
    regular = gram.clone()
    regular.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + 1e-30)
    return torch.linalg.solve(regular, cross).float()


_KINDS: dict[str, Callable[[Pairs], Tensor | None]] = {
    "none": _identity,
    "permutation": _permutation,
    "rotation": _rotation,
    "linear": _linear,
}


def rows_of(streams: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """All rows of every place, batches one behind another."""
    return (torch.cat(list(batches)) for batches in streams)
