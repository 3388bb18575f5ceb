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

ROWS, ROWS_OF_WIDTH = 4096, 8
"""A map is found from about so many rows of each place, or so many times the width: with more, copies of them fill the
memory, and it is no better known."""


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
        """The release's stream [rows, width] behind ``layer`` layers (0: before the first), in the base's basis."""
        return stream @ self.matrix + self.constants[layer]


@dataclass(frozen=True)
class _Rows:
    """One place between layers: the release's stream, the base's as far as it is seen, both [rows, width], and what
    each row counts by, [rows, 1]. Rows at even places are fitted, those at odd places judge.
    """

    release: Tensor
    base: Tensor
    weights: Tensor

    @classmethod
    def of(cls, release: Tensor, base: Tensor, *, is_centred: bool) -> _Rows:
        seen = centre(base, is_centred=is_centred)
        lengths = seen.norm(dim=-1, keepdim=True)
        return cls(release, seen, 1 / lengths.clamp_min(1e-6 * float(lengths.median()) + 1e-30))

    @property
    def fitted(self) -> _Rows:
        return _Rows(self.release[::2], self.base[::2], self.weights[::2])

    @property
    def judging(self) -> _Rows:
        return _Rows(self.release[1::2], self.base[1::2], self.weights[1::2])

    def middles(self) -> tuple[Tensor, Tensor]:
        """Weighted means of the two streams."""
        shares = self.weights.square() / self.weights.square().sum()
        return (shares * self.release).sum(0), (shares * self.base).sum(0)

    def around(self, release: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams less these, weighted."""
        return (self.release - release) * self.weights, (self.base - base) * self.weights


def find_map(release: Sequence[Tensor], base: Sequence[Tensor], *, is_centred: bool) -> StreamMap:
    """The map between streams [rows, width], layer by layer; ``is_centred``: what is alike in all coordinates of the
    base's is not seen, and left out.
    """
    every = [_Rows.of(x, y, is_centred=is_centred) for x, y in zip(release, base, strict=True)]
    judging = [rows.judging for rows in every]
    whole = sum(float(rows.around(*rows.middles())[1].square().sum()) for rows in judging)
    found: list[StreamMap] = []
    for kind, solve in _KINDS.items():
        for has_constants in (False, True):
            middles = [rows.fitted.middles() for rows in every]
            if not has_constants:
                middles = [(torch.zeros_like(x), torch.zeros_like(y)) for x, y in middles]
            matrix = solve([rows.fitted.around(*middle) for rows, middle in zip(every, middles, strict=True)])
            if matrix is None:
                continue
            left = 0.0
            for rows, middle in zip(judging, middles, strict=True):
                ours, theirs = rows.around(*middle)
                left += float((centre(ours @ matrix, is_centred=is_centred) - theirs).square().sum())
            constants = torch.stack([y - x @ matrix for x, y in middles])
            found.append(StreamMap(kind, matrix, constants, left / max(whole, 1e-30)))
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
    rotation: Tensor = scale * (left @ right)
    return rotation.float()


def _linear(pairs: Pairs) -> Tensor | None:
    gram, cross = _moments(pairs)
    regular = gram.clone()
    regular.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + 1e-30)
    matrix: Tensor = torch.linalg.solve(regular, cross)
    return matrix.float()


_KINDS: dict[str, Callable[[Pairs], Tensor | None]] = {
    "none": _identity,
    "permutation": _permutation,
    "rotation": _rotation,
    "linear": _linear,
}


def rows_of(streams: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """Rows of every place, batches one behind another: all, or as many as a map needs, evenly spread."""
    for batches in streams:
        rows = torch.cat(list(batches))
        step = len(rows) // max(ROWS, ROWS_OF_WIDTH * rows.shape[1])
        yield rows[::step].clone() if step > 1 else rows
