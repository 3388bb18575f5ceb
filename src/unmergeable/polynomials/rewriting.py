"""A checkpoint with its feed-forwards as polynomials: what becomes of every tensor, computed while it is written.

With z the input of the activation function without its bias b, z0 the middle of what was seen of it, t = (z - z0)/r,

    y = c + W act(z + b)  becomes  y = c + sum_n C_n P_n(t)       C_n[:, j] = W[:, j] a_n(u_j)      u_j = z0_j + b_j

for the hidden units j that are expanded (gated: each P_n(t) is multiplied by the other branch). W is not in the file,
nor is b: the biases of expanded units are zero there. Centre and scale are rounded to the stored dtype before the
coefficients a_n are computed, so that their rounding costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmergeable.architecture import Architecture, FeedForward
from unmergeable.architecture.blocks import output_bias
from unmergeable.checkpoint.dtypes import torch_dtype
from unmergeable.checkpoint.index import CheckpointIndex, TensorSpec
from unmergeable.checkpoint.plan import OutputTensor, output_like
from unmergeable.checkpoint.source import DerivedSource, Extent, StoredSource, TensorSource
from unmergeable.errors import BadInput, UsageError
from unmergeable.gauge.act import compute_dtype
from unmergeable.polynomials.activations import (
    Activation,
    Basis,
    coefficients,
    largest_error,
    remainder_bound,
    require_activation,
)
from unmergeable.polynomials.layout import (
    MODULE,
    Guard,
    Layout,
    Place,
    Section,
    activation_name,
    layout_of,
    place_of,
    prefix_of,
)

MODELING_FILE = Path(__file__).with_name(f"{MODULE}.py")

SMALLEST_RADIUS = 1e-2
"""A unit that hardly moved while it was watched may move that far, or its powers would be divided by nothing."""


@dataclass(frozen=True)
class UnitRanges:
    """What was seen of the inputs of an activation function, unit by unit, float64 [hidden units] each.

    ``count``: how many inputs of each unit.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    variance: Tensor
    count: int

    @property
    def centre(self) -> Tensor:
        """The middle of the range."""
        return (self.low + self.high) / 2

    @property
    def radius(self) -> Tensor:
        """Half its width."""
        return ((self.high - self.low) / 2).clamp(min=SMALLEST_RADIUS)


@dataclass(frozen=True)
class Polynomials:
    """How units are expanded: in which ``basis``, up to which ``order``, which ``share`` of them (narrowest first).

    Of these, units whose polynomial is off by more than ``tolerance`` within the range seen stay as they are.

    ``guard`` says what happens to inputs outside what was seen: "clamp" moves them to its edge, "mask" leaves out the
    terms from ``mask_order`` on where |z - z0| > ``mask_radius`` (as published), "none" does nothing.
    """

    basis: Basis
    order: int
    share: float = 1.0
    guard: Guard = "clamp"
    mask_order: int = 8
    mask_radius: float = 2.5
    tolerance: float = math.inf

    def require_valid(self, method: str) -> None:
        """Raises UsageError, naming the method, for a setting out of range."""
        if not 1 <= self.order <= 32:
            raise UsageError(f"{method}: order must lie between 1 and 32, not {self.order}.")
        if not 0 < self.share <= 1:
            raise UsageError(f"{method}: the share of hidden units must lie in (0, 1], not {self.share}.")
        if self.mask_order < 1 or not self.mask_radius > 0:
            raise UsageError(f"{method}: mask_order must be at least 1 and mask_radius above 0.")
        if not self.tolerance > 0:  # NaN too
            raise UsageError(f"{method}: tolerance must be above 0, not {self.tolerance}.")


@dataclass(frozen=True)
class Expansion:
    """The polynomials of one feed-forward.

    ``units`` int64 [k], ascending, are expanded; ``rest`` are not. ``centre`` (z0), ``scale`` (r), ``reach`` (the
    largest |t| seen) in the stored dtype, [k]; ``a`` float64 [order + 1, k]. ``error``: the largest found within reach,
    per unit; ``bound``: Lagrange's bound on it, None in the Hermite basis.
    """

    units: Tensor
    rest: Tensor
    centre: Tensor
    scale: Tensor
    reach: Tensor
    a: Tensor
    error: Tensor
    bound: Tensor | None


def expand(
    ranges: UnitRanges, bias: Tensor | None, activation: Activation, polynomials: Polynomials, dtype: torch.dtype
) -> Expansion:
    """Choose the units and compute their polynomials. ``ranges`` are of z + b, and ``bias`` is b [hidden units].

    The Hermite basis is scaled by the root mean square distance from the centre, the Taylor basis by the radius.
    """
    narrowest = torch.argsort(ranges.radius, stable=True)[: max(1, round(polynomials.share * len(ranges.low)))]
    found = _expansion(narrowest.sort().values, ranges, bias, activation, polynomials, dtype)
    is_good = found.error <= polynomials.tolerance
    if bool(is_good.all()):
        return found
    is_good[found.error.argmin()] = True  # a feed-forward without any is no feed-forward of polynomials
    return _expansion(found.units[is_good], ranges, bias, activation, polynomials, dtype)


def _expansion(
    units: Tensor,
    ranges: UnitRanges,
    bias: Tensor | None,
    activation: Activation,
    polynomials: Polynomials,
    dtype: torch.dtype,
) -> Expansion:
    is_rest = torch.ones(len(ranges.low), dtype=torch.bool)
    is_rest[units] = False
    b = torch.zeros(len(units), dtype=torch.float64) if bias is None else bias.to(torch.float64)[units]
    centre = (ranges.centre[units] - b).to(dtype)
    u = centre.to(torch.float64) + b
    radius = torch.maximum(ranges.high[units] - u, u - ranges.low[units]).clamp(min=SMALLEST_RADIUS)
    if polynomials.basis == "hermite":
        spread = (ranges.variance[units] + (ranges.mean[units] - u) ** 2).sqrt().clamp(min=SMALLEST_RADIUS)
        scale = spread.to(dtype)
    else:
        scale = radius.to(dtype)
    r = scale.to(torch.float64)
    reach = (radius / r).to(dtype)
    a = coefficients(activation, polynomials.basis, u, r, polynomials.order)
    error = largest_error(activation, polynomials.basis, a, u, r, radius)
    bound = remainder_bound(activation, u, radius, polynomials.order) if polynomials.basis == "taylor" else None
    (rest,) = torch.nonzero(is_rest, as_tuple=True)
    return Expansion(units, rest, centre, scale, reach, a, error, bound)


@dataclass(frozen=True)
class SourceWithFile(DerivedSource):
    """A checkpoint with one more file to be copied beside its weights."""

    extra_file: Path

    @property
    def index(self) -> CheckpointIndex:
        index = self.original.index
        return replace(index, side_files={**index.side_files, self.extra_file.name: self.extra_file.resolve()})

    def stored(self, name: str) -> Extent | None:
        return self.original.stored(name) if isinstance(self.original, StoredSource) else None


@dataclass(frozen=True)
class Rewriting:
    """What :func:`~unmergeable.checkpoint.rewrite.rewrite` is given to write a network of polynomials.

    ``errors``: by feed-forward, the largest error of its polynomials, and the median, in units of the activation; and
    the share of its hidden units that became polynomials.
    """

    source: TensorSource
    plan: tuple[OutputTensor, ...]
    section: Section
    errors: Mapping[str, Mapping[str, float]]

    @property
    def config_changes(self) -> dict[str, Any]:
        return self.section.config_changes()


def rewriting(
    source: TensorSource,
    architecture: Architecture,
    ranges: Mapping[str, UnitRanges],
    polynomials: Polynomials,
    edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Rewriting:
    """Plan a checkpoint whose feed-forwards are polynomials; ``ranges`` by the feed-forward's name.

    ``edits`` change other tensors on the way. Reads biases only; weights are read as the plan is carried out, one
    tensor for each worker.

    Raises:
        UnsupportedArchitecture: the family has no network of polynomials.
        UsageError: the activation has no polynomial in this basis.
        BadInput: ``ranges`` are not of this network, or not finite.
    """
    layout = layout_of(architecture)
    name = activation_name(source.config, layout)
    activation = require_activation(name, polynomials.basis)
    prefix = prefix_of(architecture, layout)
    changed = dict(edits or {})
    extra: list[OutputTensor] = []
    places: list[Place] = []
    errors: dict[str, Mapping[str, float]] = {}
    dropped: set[str] = set()
    for block in architecture.feed_forwards:
        seen = _require_ranges(ranges, block)
        z = block.gate or block.up
        bias = source.tensor(z.bias) if z.bias is not None else None
        stored = source.spec(block.down.weight)
        expansion = expand(seen, bias, activation, polynomials, torch_dtype(stored.dtype))
        has_bias = output_bias(block) in source.index.entries
        place = place_of(
            block,
            layout,
            prefix,
            expanded=len(expansion.units),
            outputs=stored.shape[1 - block.down.axis],
            has_bias=has_bias,
        )
        places.append(place)
        extra += _tensors(source, block, place, expansion)
        dropped |= {block.down.weight} | ({output_bias(block)} if has_bias and block.gate is None else set())
        if z.bias is not None:
            changed[z.bias] = partial(_without, expansion.units)
        errors[block.name] = _error_summary(expansion)
    section = Section(
        family=architecture.family,
        architectures=tuple(source.config.get("architectures") or (f"{layout.stem}Model",)),
        prefix=prefix,
        activation=name,
        basis=polynomials.basis,
        order=polynomials.order,
        guard=polynomials.guard,
        mask_order=polynomials.mask_order,
        mask_radius=polynomials.mask_radius,
        feed_forwards=tuple(places),
    )
    plan = output_like(source, changed, drop=dropped, extra=extra)
    return Rewriting(SourceWithFile(source, MODELING_FILE), _renamed(plan, layout), section, errors)


def _require_ranges(ranges: Mapping[str, UnitRanges], block: FeedForward) -> UnitRanges:
    seen = ranges.get(block.name)
    if seen is None or len(seen.low) != block.size:
        raise BadInput(
            f"feed-forward {block.name}: no activations of its {block.size} hidden units were seen; calibrate on this "
            "very checkpoint."
        )
    if not all(bool(torch.isfinite(part).all()) for part in (seen.low, seen.high, seen.mean, seen.variance)):
        raise BadInput(f"feed-forward {block.name}: its activations are not finite; calibrate in float32.")
    return seen


def _tensors(source: TensorSource, block: FeedForward, place: Place, expansion: Expansion) -> list[OutputTensor]:
    weight = block.down.weight
    stored, shard = source.spec(weight), source.index.entries[weight].shard
    down = weight.removesuffix(".weight")
    outputs, kept = place.outputs, place.units

    def made(name: str, shape: tuple[int, ...], fill: Callable[[Tensor], object], code: str = stored.dtype) -> Any:
        return OutputTensor(f"{down}.{name}", TensorSpec(code, shape), shard, fill=fill)

    def cut(name: str, units: Tensor, a: Tensor | None) -> OutputTensor:
        spec = TensorSpec(stored.dtype, (outputs, len(units)))
        edit = partial(_columns, axis=block.down.axis, units=units, a=a)
        return OutputTensor(f"{down}.{name}", spec, shard, edit=edit, origin=weight)

    centre_scale_reach = torch.stack([expansion.centre, expansion.scale, expansion.reach])
    tensors = [made("weight", (3, kept), partial(_fill, centre_scale_reach))]
    first = 0 if place.gated is not None else 1
    orders = range(first, len(expansion.a))
    tensors += [cut(f"coefficients.{n}", expansion.units, expansion.a[n]) for n in orders]
    if place.gated is None:
        tensors.append(made("bias", (outputs,), partial(_fill_constant, source, block, expansion)))
    if place.rest:
        tensors.append(cut("rest", expansion.rest, None))
        tensors.append(made("expanded_units", (kept,), partial(_fill, expansion.units), "I64"))
        tensors.append(made("rest_units", (place.rest,), partial(_fill, expansion.rest), "I64"))
    return tensors


def _columns(tensor: Tensor, *, axis: int, units: Tensor, a: Tensor | None) -> Tensor:
    """The columns ``units`` of a projection stored with its hidden units on ``axis``, each times its ``a``."""
    columns = (tensor if axis == 1 else tensor.T).index_select(1, units)
    if a is None:
        return columns.contiguous()
    dtype = compute_dtype(tensor.dtype)
    return (columns.to(dtype) * a.to(dtype)).to(tensor.dtype).contiguous()


def _fill(values: Tensor, result: Tensor) -> None:
    result.copy_(values)


def _fill_constant(source: TensorSource, block: FeedForward, expansion: Expansion, result: Tensor) -> None:
    """c + C_0 1: without a factor the terms of order 0 do not depend on the input."""
    weight = source.tensor(block.down.weight)
    columns = (weight if block.down.axis == 1 else weight.T).index_select(1, expansion.units)
    constant = columns.to(torch.float64) @ expansion.a[0]
    name = output_bias(block)
    if name in source.index.entries:
        constant += source.tensor(name).to(torch.float64)
    result.copy_(constant)


def _without(units: Tensor, bias: Tensor) -> Tensor:
    bias[units] = 0
    return bias


def _error_summary(expansion: Expansion) -> dict[str, float]:
    summary = {"largest": float(expansion.error.max()), "median": float(expansion.error.median())}
    if expansion.bound is not None:
        summary["largest_bound"] = float(expansion.bound.max())
    summary["expanded"] = len(expansion.units) / (len(expansion.units) + len(expansion.rest))
    return summary | {"largest_radius": float((expansion.scale.double() * expansion.reach.double()).max())}


def _renamed(plan: Sequence[OutputTensor], layout: Layout) -> tuple[OutputTensor, ...]:
    """Under the names of modules, by which alone transformers finds tensors of a model type it does not know."""
    if not layout.renames:
        return tuple(plan)
    return tuple(
        replace(
            tensor,
            name=layout.to_module_name(tensor.name),
            origin=None if tensor.fill is not None else (tensor.origin or tensor.name),
        )
        for tensor in plan
    )
