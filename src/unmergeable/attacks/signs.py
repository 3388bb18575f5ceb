"""Signs of a protection, from the weights of a checkpoint and its base alone.

Every sign is a number that fine-tuning does not produce (:mod:`unmergeable.attacks.evidence`), beyond a threshold:

    another basis       distance to the base as stored against after ``nearest_orbit``, and what its gauges do: matrices
                        that are not diagonal (gauge), diagonal ones (scaling), permutations
    traded constants    biases, gains or scales that moved against those beside them (``canonicalise``)
    normed scales       a stream, or what a norm reads, times one number                (``attacks/prepared.py``)
    config scales       numbers that ``config.json`` multiplies by, others than the base's  (the same)
    spoilt numbers      NaN, or rows beyond all measure, where nothing reads them       (likewise)
    other words         another model type, or biases that add nothing               (``attacks/restated.py``)
                        tensors of another type of network             (``attacks/transcription.py``)
                        rotary frequencies in another order             (``gauge/config_frequencies.py``)
    idle structure      layers, heads or hidden units more than the base's that add nothing (``lossless_pruning``)
    polynomial FFN      the base's feed-forward tensors are gone, others have come
    reset entries       entries equal to the base's among those where the smallest change would show
    shrink              c = 1 - <theta, theta_0> / ||theta_0||^2, positive in nearly every matrix
    mixture             the coefficients of given siblings in the task vector

A sign proves no intent: a pruned fine-tune has reset entries too, weight decay shrinks, a merge is a mixture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from unmergeable.architecture import Architecture
from unmergeable.architecture.symmetry import Role
from unmergeable.attacks.base import Estimate, Fit, Inputs
from unmergeable.attacks.distance import relative_distance
from unmergeable.attacks.evidence import off_diagonal, out_of_place, reset_entries, spread
from unmergeable.attacks.lossless_pruning import LosslessPruning
from unmergeable.attacks.prepared import Prepared
from unmergeable.attacks.source_subtraction import mixture
from unmergeable.attacks.task_vector_rescale import shrink
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import Mismatch
from unmergeable.polynomials.layout import SECTION
from unmergeable.progress import Progress, silent

SignName = Literal[
    "gauge",
    "scaling",
    "permutation",
    "traded constants",
    "normed scales",
    "config scales",
    "spoilt numbers",
    "other words",
    "idle structure",
    "polynomial FFN",
    "reset entries",
    "shrink",
    "mixture of siblings",
]

UNRELATED = 0.7
"""Relative distance from which a base is not believed: independent weights of equal norm are sqrt(2) apart."""

REBASED = 1.5
"""How many times nearer the base the best gauge must bring weights to be a sign. For a fine-tune that is the root of
the share of its task vector that the fitted numbers take up: 1.1 in the narrowest heads."""

WORTH_LOOKING = 0.05
"""Relative distance as stored below which weights merge whatever their basis."""

OFF_DIAGONAL = 0.05
"""Share of a matrix's squared entries off its diagonal that tells a basis from scales; the fit to a task vector of 30 %
leaves less than that."""

OUT_OF_PLACE = 0.01
"""Share of heads or hidden units in another place."""

SPREAD = 0.1
"""Root mean square of the logarithms of scales."""

RESET = 0.05
"""Share of entries equal to the base's. Among those that are looked at, at most about 1 % are by chance."""

SHRUNK = 0.01
"""Median c over matrices. Weight decay of a fine-tune stays below."""

AGREEING = 0.9
"""Share of matrices whose c has to be positive for a shrink."""

MIXED = 0.02
"""Coefficient of a sibling; unrelated task vectors of N numbers give about 1 / sqrt(N)."""


@dataclass(frozen=True)
class Sign:
    """``evidence`` is a sentence with the number; ``recovery`` the method that undoes it, None where there is none."""

    name: SignName
    evidence: str
    recovery: str | None


def find_signs(
    checkpoint: TensorSource,
    base: TensorSource,
    architecture: Architecture,
    estimate: Estimate,
    sources: Sequence[TensorSource] = (),
    progress: Progress = silent,
) -> tuple[Sign, ...]:
    """Every sign there is in a checkpoint of the base's structure; none where the base is not its base.

    Args:
        checkpoint: what is looked at.
        base: what it was fine-tuned from.
        architecture: of both.
        estimate: of ``nearest_orbit``, for this checkpoint and base.
        sources: fine-tunes of the base that may be mixed into it.
        progress: called with the tensors looked at.

    Raises:
        Mismatch: when the sources are not different fine-tunes of the base.
        BadInput: when one of the checkpoints holds NaN or infinity.
    """
    if not is_near(estimate.fits):
        return ()
    attention, feed_forward = halves(estimate.fits)
    # A shrink and equal entries mean nothing in another basis.
    roles: list[Role] = [] if _is_rebased(attention) else ["query_key", "value_output"]
    roles += [] if _is_rebased(feed_forward) else ["feed_forward"]
    matrices = _comparable_matrices(checkpoint, base, architecture, roles)
    signs = gauge_signs(estimate) + weight_signs(checkpoint, base, matrices, progress)
    return tuple(signs + (mixture_signs(checkpoint, sources, base, progress) if sources else []))


def is_near(fits: Iterable[Fit]) -> bool:
    """Whether the base is the checkpoint's, as far as these parts of blocks tell: near in some basis."""
    return relative_distance(fit.after for fit in fits) < UNRELATED


def halves(fits: Iterable[Fit]) -> tuple[tuple[Fit, ...], tuple[Fit, ...]]:
    """Those of attention and those of feed-forwards."""
    fits = tuple(fits)
    feed_forward = tuple(fit for fit in fits if fit.before.part == "feed_forward")
    return tuple(fit for fit in fits if fit.before.part != "feed_forward"), feed_forward


def gauge_signs(estimate: Estimate) -> list[Sign]:
    """Signs that weights are in another basis than the base's, from an estimate of ``nearest_orbit``."""
    signs: list[tuple[SignName, str]] = []
    attention, feed_forward = halves(estimate.fits)
    if estimate.template is not None:
        evidence = f"{_distances(estimate.fits)} and with {', '.join(estimate.traces)} as the base has them."
        return [Sign("traded constants", f"weights are {evidence}", "nearest_orbit")]
    if any(space.role == "residual" for gauge in estimate.gauges for space in gauge.spaces.values()):
        signs.append(
            ("gauge", "embeddings are near the base's only after a turn or reordering of the residual stream.")
        )
    if _is_rebased(attention):
        nearer = f"attention weights are {_distances(attention)}"
        share = off_diagonal(estimate.gauges, _ATTENTION)
        scales = spread(estimate.gauges, _ATTENTION)
        moved = out_of_place(estimate.gauges, "heads")
        if share > OFF_DIAGONAL:
            signs.append(("gauge", f"{nearer}; {share:.0%} of the matrices that lead there lies off their diagonals."))
        elif scales > SPREAD:
            signs.append(("scaling", f"{nearer}; the scales that lead there spread by {scales:.2g}."))
        if moved > OUT_OF_PLACE:
            signs.append(("permutation", f"{nearer}; {moved:.0%} of the key-value heads are out of place."))
    if _is_rebased(feed_forward):
        nearer = f"feed-forward weights are {_distances(feed_forward)}"
        moved = out_of_place(estimate.gauges, "feed_forward")
        scales = spread(estimate.gauges, ("feed_forward",))
        if moved > OUT_OF_PLACE:
            signs.append(("permutation", f"{nearer}; {moved:.0%} of the hidden units are out of place."))
        if scales > SPREAD:
            signs.append(("scaling", f"{nearer}; the scales of hidden units spread by {scales:.2g}."))
    return [Sign(name, evidence, "nearest_orbit") for name, evidence in signs]


_HIDDEN: Mapping[str, tuple[SignName, str]] = {
    "model_type": ("other words", "it is called another type than its base, which computes the same: {}."),
    "idle_biases": ("other words", "biases that the base has not, and that add nothing: {}."),
    "frequencies": ("other words", "its config.json lists other rotary frequencies, to the same effect: {}."),
    "scales": ("normed scales", "norms divide these out, and they are far from the base's: {}."),
    "config_scales": ("config scales", "its config.json multiplies by other numbers than the base's: {}."),
    "not_finite": ("spoilt numbers", "NaN or infinity, which a network that works does not read: {}."),
    "rows_unread": ("spoilt numbers", "{} rows of the embedding are too long to be read by a text."),
}
"""The sign, and the evidence for it, of what is found first, by the name of the finding."""


def hidden_signs(first: Prepared) -> list[Sign]:
    """Signs of what had to be done with a checkpoint before it could be compared at all."""
    return [
        Sign(name, evidence.format(first.found[finding]), "nearest_orbit")
        for finding, (name, evidence) in _HIDDEN.items()
        if finding in first.found
    ]


def structure_signs(checkpoint: TensorSource, base: TensorSource, base_architecture: Architecture) -> list[Sign]:
    """Whether the base's feed-forwards were replaced by something else; from names and shapes alone."""
    symmetry = base_architecture.symmetry
    attention, feed_forward = (
        set(symmetry.tensors_of(symmetry.select(*roles))) for roles in (_ATTENTION, _FEED_FORWARD)
    )
    held = set(checkpoint.names)
    gone = {name for name in feed_forward if name not in held or checkpoint.spec(name).shape != base.spec(name).shape}
    come = held - set(base.names)
    if not gone or not come or not attention - feed_forward <= held:
        return []
    evidence = (
        f"{len(gone)} of the base's {len(feed_forward)} feed-forward tensors are gone or of another shape, and "
        f"{len(come)} others have come, {min(come)} among them."
    )
    # Where config.json describes the polynomials, what they hide can be solved for.
    recovery = "taylor_inversion" if SECTION in checkpoint.config else "revert_to_base"
    return [Sign("polynomial FFN", evidence, recovery)]


def idle_structure(checkpoint: TensorSource, base: TensorSource, base_architecture: Architecture) -> Sign | None:
    """Whether the checkpoint is the base's network with parts that add nothing; None where it is another.

    Raises:
        BadInput, UnsupportedArchitecture: as :class:`~unmergeable.attacks.lossless_pruning.LosslessPruning`.
    """
    try:
        found = LosslessPruning().recover(Inputs(checkpoint, base, base_architecture)).findings["taken_away"]
    except Mismatch:
        return None
    if found == "nothing":
        return None
    return Sign("idle structure", f"{found} more than the base has, and they add nothing.", LosslessPruning.name)


def weight_signs(
    checkpoint: TensorSource, base: TensorSource, names: Sequence[str], progress: Progress = silent
) -> list[Sign]:
    """Reset entries, and a shrink, in the matrices ``names``, both in the base's basis.

    Raises:
        BadInput: when one of them holds NaN or infinity.
    """
    signs: list[Sign] = []
    resets, shrinks = [], []
    for done, name in enumerate(names, start=1):
        resets.append(reset_entries(checkpoint, base, name))
        shrinks.append(shrink(checkpoint, base, name))
        progress("looking for signs", done, len(names), "tensors")
    equal, visible = (sum(counts) for counts in zip(*resets, strict=True)) if resets else (0, 0)
    if visible and equal / visible > RESET:
        evidence = f"{equal / visible:.1%} of the entries in which any change would show equal the base's exactly."
        signs.append(Sign("reset entries", evidence, None))
    agreeing = sum(c > 0 for c in shrinks) / len(shrinks) if shrinks else 0.0
    if agreeing >= AGREEING and median(shrinks) > SHRUNK:
        evidence = f"{agreeing:.0%} of the matrices are shrunk towards zero, by {median(shrinks):.1%} in the median."
        signs.append(Sign("shrink", evidence, "task_vector_rescale"))
    return signs


def mixture_signs(
    checkpoint: TensorSource, sources: Sequence[TensorSource], base: TensorSource, progress: Progress = silent
) -> list[Sign]:
    """Whether given fine-tunes are mixed into the checkpoint.

    Raises:
        Mismatch: when the sources are not different fine-tunes of the base.
        BadInput: when one of the checkpoints holds NaN or infinity.
    """
    coefficients = mixture(checkpoint, sources, base, progress).tolist()
    mixed = [
        f"{coefficient:.3f} of {source.description}"
        for source, coefficient in zip(sources, coefficients, strict=True)
        if coefficient > MIXED
    ]
    if not mixed:
        return []
    return [Sign("mixture of siblings", f"its task vector contains {', '.join(mixed)}.", "source_subtraction")]


def _comparable_matrices(
    checkpoint: TensorSource, base: TensorSource, architecture: Architecture, roles: Sequence[Role]
) -> list[str]:
    """Weights in spaces of these roles that both hold in one shape and dtype."""
    return [
        name
        for name in architecture.symmetry.tensors_of(architecture.symmetry.select(*roles))
        if len(base.spec(name).shape) >= 2 and checkpoint.spec(name) == base.spec(name)
    ]


_ATTENTION: tuple[Role, ...] = ("query_key", "value_output")
_FEED_FORWARD: tuple[Role, ...] = ("feed_forward",)


def _is_rebased(fits: Sequence[Fit]) -> bool:
    before = relative_distance(fit.before for fit in fits)
    return before > WORTH_LOOKING and before > REBASED * relative_distance(fit.after for fit in fits)


def _distances(fits: Sequence[Fit]) -> str:
    before, after = (relative_distance(getattr(fit, side) for fit in fits) for side in ("before", "after"))
    return f"{before:.2f} from the base as stored and {after:.2f} in the nearest basis"
