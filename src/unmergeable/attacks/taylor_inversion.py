"""taylor_inversion: the output projection back from the polynomials that hide it (TaylorMLP, MergeBarrier).

In a feed-forward of polynomials (arXiv 2410.05331, 2511.10712) the coefficients of hidden unit j are

    C_n[:, j] = W[:, j] a_n(u_j)        n = 0 ... N        u_j = z0_j + b_j

an outer product of the column that is hidden and numbers that everybody can compute: the activation function's own
coefficients around u_j. Without a bias u_j = z0_j is in the file. With one, a single unknown u_j stands against
N outputs equations: the norms of C_n[:, j] over n are those of a_n(u_j) up to one factor. u_j is looked for on a grid
around z0_j and refined by Gauss-Newton steps; then W[:, j] is the weighted mean of C_n[:, j] / a_n(u_j), b_j is
u_j - z0_j, and what order 0 added to the output bias is taken off it. N + 1 rounded copies of a column average out
part of the rounding.

The result is a checkpoint of the original architecture, which merges as the expert does. Attention is left as it is:
its signs (MergeBarrier) are a change of basis, which ``nearest_orbit`` undoes afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from unmergeable.attacks.base import AttackRequirements, Inputs, Recovered
from unmergeable.attacks.in_memory import in_memory
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import Mismatch, UsageError
from unmergeable.polynomials.activations import Activation, Basis, coefficients, require_activation
from unmergeable.polynomials.layout import Place, Section, names_on_disk
from unmergeable.progress import Progress, silent

_CHUNK_UNITS = 256
_STEPS = 30
_PRECISION = 1e-5  # of u, as far as weights are concerned: where a_n crosses zero its relative error is not that of a_n
_TINY = 1e-250


@dataclass(frozen=True)
class TaylorInversion:
    """``span``: biases are looked for in [-span, span], at ``points`` places first."""

    name: ClassVar[str] = "taylor_inversion"
    summary: ClassVar[str] = "the hidden projection, solved for from the coefficients of a polynomial feed-forward"

    span: float = 8.0
    points: int = 257

    def validate(self) -> None:
        """Raises UsageError unless span is positive and there are at least three points."""
        if not self.span > 0 or self.points < 3:
            raise UsageError(
                f"taylor_inversion: span must be positive and points at least 3, not {self.span}, {self.points}."
            )

    def requirements(self) -> AttackRequirements:
        return AttackRequirements(needs=("base",), structure="any")

    def recover(self, inputs: Inputs, progress: Progress = silent) -> Recovered:
        """Solves for the biases, one layer in memory at a time; the projections are computed as they are written.

        Raises:
            BadInput: the protected checkpoint holds no polynomials.
            Mismatch: the base is not the network they were made from.
        """
        protected, base = inputs.protected, inputs.base
        section = Section.from_config(protected.config, protected.description)
        activation = require_activation(section.activation, section.basis)
        layers = [_Layer(section, place, protected) for place in section.feed_forwards]
        edits: dict[str, Callable[[Tensor], Tensor]] = {}
        biases, worst = 0, 0.0
        for done, layer in enumerate(layers, start=1):
            _require_belongs(layer, base)
            u, misfit = layer.centre, 0.0
            if layer.bias in base.index.entries:
                curve = Curve(activation, section.basis, layer.orders)
                u, misfits = find_centres(
                    layer.norms(), layer.centre, layer.scale, curve, span=self.span, points=self.points
                )
                misfit, biases = float(misfits.max()), biases + len(u)
                edits[layer.bias] = partial(layer.with_bias, u - layer.centre)
            worst = max(worst, misfit)
            solved = _Solved(layer, activation, u, is_known=layer.bias not in base.index.entries)
            edits[layer.weight] = solved.projection
            if layer.place.original_bias and layer.place.gated is None:
                edits[layer.output_bias] = solved.output_bias
            progress("solving", done, len(layers), "layers")
        held = names_on_disk(protected.config, protected.description, protected.names)
        for name in base.names:
            if name in held and name not in edits:
                _require_shape(protected, base, held[name], name)
                edits[name] = partial(_taken_from, protected, held[name])
        findings = {
            "feed_forwards_solved": len(layers),
            "biases_solved": biases,
            "largest_misfit": worst,
            "tensors_from_base": len(base.names) - len(edits),
        }
        return Recovered(base, edits, findings)


@dataclass(frozen=True)
class _Layer:
    """One feed-forward of polynomials in the protected checkpoint; names without ``module`` are the original's."""

    section: Section
    place: Place
    source: TensorSource

    @property
    def module(self) -> str:
        return self.section.prefix + self.place.down

    def _original(self, name: str) -> str:
        return self.section.layout.to_disk_name(self.section.prefix + name)

    @property
    def weight(self) -> str:
        return self._original(f"{self.place.down}.weight")

    @property
    def output_bias(self) -> str:
        return self._original(f"{self.place.down}.bias")

    @property
    def bias(self) -> str:
        return self._original(f"{self.place.up}.bias")

    @property
    def centre(self) -> Tensor:
        return self.source.tensor(f"{self.module}.weight")[0].to(torch.float64)

    @property
    def scale(self) -> Tensor:
        return self.source.tensor(f"{self.module}.weight")[1].to(torch.float64)

    @property
    def orders(self) -> range:
        return range(0 if self.place.gated is not None else 1, self.section.order + 1)

    @property
    def units(self) -> Tensor:
        if not self.place.rest:
            return torch.arange(self.place.units)
        return self.source.tensor(f"{self.module}.expanded_units")

    def coefficient(self, order: int) -> Tensor:
        """C_n, [outputs, units], as stored."""
        return self.source.tensor(f"{self.module}.coefficients.{order}")

    def norms(self) -> Tensor:
        """Norms of C_n[:, j] with the signs of its inner product with the longest of them, float64 [orders, units]."""
        stored = torch.stack([self.coefficient(order) for order in self.orders])
        parts = []
        for part in stored.split(_CHUNK_UNITS, dim=2):
            columns = part.to(torch.float64)
            lengths = columns.norm(dim=1)
            longest = lengths.argmax(0)
            reference = columns[longest, :, torch.arange(columns.shape[2])].T
            parts.append(lengths * torch.sign((columns * reference).sum(1)))
        return torch.cat(parts, dim=1)

    def with_bias(self, solved: Tensor, tensor: Tensor) -> Tensor:
        """The up-branch's bias (``tensor`` gives dtype and shape): ``solved`` where units were expanded."""
        stored = self.source.tensor(self.section.prefix + self.place.up + ".bias").to(torch.float64)
        stored[self.units] = solved
        return stored.to(tensor.dtype)


@dataclass(frozen=True)
class _Solved:
    """A layer with the centres of its polynomials; ``is_known``: they were read and not solved for."""

    layer: _Layer
    activation: Activation
    u: Tensor
    is_known: bool

    def columns(self) -> Tensor:
        """W[:, units], float64 [outputs, units]: the weighted mean of C_n / a_n.

        The entries of C_n have errors in proportion to themselves, a_n one in proportion to its slope in u, where u
        was solved for. Both are of the order of the stored dtype's rounding.
        """
        orders = self.layer.orders
        a, slope = Curve(self.activation, self.layer.section.basis, orders).at(self.u, self.layer.scale)
        variance = a**2 if self.is_known else a**2 + slope**2
        weights = 1 / variance.clamp(min=_TINY)
        total = torch.zeros(self.layer.place.outputs, self.layer.place.units, dtype=torch.float64)
        weight_of_all = torch.zeros(self.layer.place.units, dtype=torch.float64)
        for index, order in enumerate(orders):
            stored = self.layer.coefficient(order).to(torch.float64)
            # A coefficient below the smallest stored number is gone, and says nothing.
            is_there = (stored != 0).any(0)
            total += stored * (weights[index] * a[index] * is_there)
            weight_of_all += weights[index] * a[index] ** 2 * is_there
        return total / weight_of_all.clamp(min=_TINY)

    def projection(self, tensor: Tensor) -> Tensor:
        """The whole W; ``tensor`` gives dtype and storage."""
        place, layer = self.layer.place, self.layer
        full = torch.empty(place.outputs, place.units + place.rest, dtype=torch.float64)
        full[:, layer.units] = self.columns()
        if place.rest:
            rest = layer.source.tensor(f"{layer.module}.rest_units")
            full[:, rest] = layer.source.tensor(f"{layer.module}.rest").to(torch.float64)
        return (full.T if place.transposed else full).to(tensor.dtype).contiguous()

    def output_bias(self, tensor: Tensor) -> Tensor:
        """c = what is stored minus the terms of order 0."""
        section = self.layer.section
        a = coefficients(self.activation, section.basis, self.u, self.layer.scale, section.order)
        stored = self.layer.source.tensor(f"{self.layer.module}.bias").to(torch.float64)
        return (stored - self.columns() @ a[0]).to(tensor.dtype)


@dataclass(frozen=True)
class Curve:
    """The numbers a_n(u) of one activation function and basis, for ``orders``, as a curve over u."""

    activation: Activation
    basis: Basis
    orders: range

    def at(self, u: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """a_n(u) and its derivative in u, float64 [orders, k] each, for scales ``r``.

        The derivative of a coefficient is the next one: r a_n' = (n + 1) a_(n+1) in powers, and with the square root
        of n + 1 in orthonormal Hermite polynomials (an integration by parts).
        """
        a = coefficients(self.activation, self.basis, u, r, self.orders[-1] + 1)
        steps = torch.arange(1, len(a), dtype=torch.float64)[:, None]
        slopes = (steps if self.basis == "taylor" else steps.sqrt()) * a[1:] / r
        return a[self.orders[0] : -1], slopes[self.orders[0] :]


def find_centres(
    norms: Tensor, centre: Tensor, r: Tensor, curve: Curve, *, span: float, points: int
) -> tuple[Tensor, Tensor]:
    """The u_j within ``span`` of ``centre`` at which the curve is in proportion to ``norms`` [orders, k].

    Returns them and the root mean square misfit relative to the a_n, float64 [k] each.
    """
    centres, misfits = [], []
    for part in torch.arange(len(centre)).split(_CHUNK_UNITS):
        start = _best_on_grid(norms[:, part], centre[part], r[part], curve, span, points)
        u, misfit = _refined(norms[:, part], start, r[part], curve, largest_step=2 * span / (points - 1))
        centres.append(u)
        misfits.append(misfit)
    return torch.cat(centres), torch.cat(misfits)


def _best_on_grid(norms: Tensor, centre: Tensor, r: Tensor, curve: Curve, span: float, points: int) -> Tensor:
    """The grid point with the largest weighted cosine between norms and curve."""
    step = 2 * span / (points - 1)
    best, place = torch.full_like(centre, -1.0), centre
    for shift in torch.linspace(-span, span, points, dtype=torch.float64):
        a, slope = curve.at(centre + shift, r)
        weights = _weights(a, slope, step)
        product, ours, theirs = ((weights * x * y).sum(0) for x, y in ((a, norms), (a, a), (norms, norms)))
        cosine = product**2 / (ours * theirs).clamp(min=_TINY)
        is_better = cosine > best
        best, place = torch.where(is_better, cosine, best), torch.where(is_better, centre + shift, place)
    return place


def _refined(norms: Tensor, u: Tensor, r: Tensor, curve: Curve, *, largest_step: float) -> tuple[Tensor, Tensor]:
    """Gauss-Newton steps on norms = length * a(u), for length and u together.

    Weights start as coarse as the grid, and sharpen with u: an a_n near its zero would else rule the first steps.
    """
    for step in range(_STEPS):
        a, slope = curve.at(u, r)
        weights = _weights(a, slope, max(largest_step * 0.5**step, _PRECISION))
        length = (weights * a * norms).sum(0) / (weights * a * a).sum(0).clamp(min=_TINY)
        # With the best length for this u, what is left has no part along a: only the slope across a moves it.
        across = slope - a * (weights * a * slope).sum(0) / (weights * a * a).sum(0).clamp(min=_TINY)
        residual = norms - length * a
        move = (weights * across * residual).sum(0) / (length * (weights * across * across).sum(0))
        u = u + torch.nan_to_num(move).clamp(-largest_step, largest_step)
    a, slope = curve.at(u, r)
    weights = _weights(a, slope, _PRECISION)
    length = (weights * a * norms).sum(0) / (weights * a * a).sum(0).clamp(min=_TINY)
    return u, torch.sqrt((weights * (norms / length - a) ** 2).mean(0))


def _weights(a: Tensor, slope: Tensor, precision: float) -> Tensor:
    """Errors of the stored numbers are in proportion to them; those of a(u) to its slope and the precision of u."""
    return 1 / (a**2 + (precision * slope) ** 2).clamp(min=_TINY)


def _require_belongs(layer: _Layer, base: TensorSource) -> None:
    place = layer.place
    shape = (place.outputs, place.units + place.rest)
    expected = shape[::-1] if place.transposed else shape
    if layer.weight not in base.index.entries or tuple(base.spec(layer.weight).shape) != expected:
        raise Mismatch(
            f"{base.description} has no tensor {layer.weight} of shape {list(expected)}, which "
            f"{layer.source.description} was made from; give its base."
        )


def _require_shape(protected: TensorSource, base: TensorSource, held: str, name: str) -> None:
    ours, theirs = protected.spec(held).shape, base.spec(name).shape
    if ours != theirs:
        raise Mismatch(
            f"tensor {name} is {list(ours)} in {protected.description} and {list(theirs)} in {base.description}; "
            "give its base."
        )


def _taken_from(source: TensorSource, name: str, tensor: Tensor) -> Tensor:
    return source.tensor(name).to(tensor.dtype)


taylor_inversion = in_memory(TaylorInversion)
"""The attack on weights in memory: see :mod:`unmergeable.attacks.in_memory`."""
