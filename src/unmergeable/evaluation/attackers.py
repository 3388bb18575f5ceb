"""Attackers by name and version: what an audit tries when a plan does not list its own merges and recoveries.

    quick-1      minutes: for continuous integration, and for a first look
    standard-1   every recovery, alone and in chains, every merge of the short list after the best of them
    full-1       the same, every recovery with every merge, the costly ones always
    standard-0   of older plans: every recovery with a few merges, on the grid alone

A name without a version is the newest version. What a version does never changes, so that audits stay comparable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unmergeable.evaluation.plans.fields import require_named
from unmergeable.network.precision import FULL, Precision

Combining = Literal["all", "best"]

LISTED = "as the plan lists it"
"""The name of an attacker who is none of these."""


@dataclass(frozen=True)
class Attacker:
    """What is tried.

    Attributes:
        merges: as a plan lists them. Under ``combines="best"`` the first is done after every recovery.
        recoveries: as a plan lists them; those with commas are done one after another.
        combines: "all" for every recovery with every merge; "best" for every merge with the release as it is, every
            recovery with the first merge, and every other merge with the recovery that then does best.
        extends: whether coefficients leave the grid where the best lie on its edge.
        by_part: whether attention and feed-forwards, early and late, have coefficients of their own.
        last: recoveries that are costly, and are left out where the basis of a release was found without them.
        trainings: ways to train on labelled examples, each as settings of few_shot; the plan's own come on top.
    """

    name: str
    merges: tuple[str, ...]
    recoveries: tuple[str, ...]
    combines: Combining = "all"
    extends: bool = False
    by_part: bool = False
    last: tuple[str, ...] = ()
    trainings: tuple[Mapping[str, Any], ...] = ({},)


_ALONE = (
    "nearest_orbit",
    "canonicalise",
    "lossless_pruning",
    "block_regression",
    "kabsch",
    "neuron_matching",
    "diagonal_ratio",
    "revert_to_base",
    "task_vector_rescale",
    "taylor_inversion",
)
"""Every recovery that needs no more than the release and the base."""

_CHAINS = (
    "canonicalise, nearest_orbit",
    "lossless_pruning, nearest_orbit",
    "taylor_inversion, nearest_orbit",
    "nearest_orbit, task_vector_rescale",
    "block_regression, nearest_orbit",
)
"""What one leaves for the next: trades for bases, structure and polynomials for heads, a basis for the scale."""

_MERGES = ("task_arithmetic", "linear", "ties", "dare_linear", "dare_ties", "slerp", "tsv_m", "iso_c")
"""The short list of a red team: averages, sums, elections, random masks, a sphere, and two that look at spectra."""

_LAST = ("block_regression",)
"""It asks what a release computes, which is the costly way to find a basis that can be seen."""

_TRAININGS: tuple[Mapping[str, Any], ...] = ({}, {"steps": 30}, {"low_rank": 8}, {"last_layers": 2})

ATTACKERS = {
    attacker.name: attacker
    for attacker in (
        Attacker(
            name="standard-0",
            merges=("linear", "task_arithmetic", "ties", "slerp"),
            recoveries=(
                "nearest_orbit",
                "canonicalise",
                "kabsch",
                "neuron_matching",
                "diagonal_ratio",
                "revert_to_base",
                "task_vector_rescale",
                "taylor_inversion",
                "taylor_inversion, nearest_orbit",
            ),
        ),
        Attacker(
            name="quick-1",
            merges=("task_arithmetic", "ties"),
            recoveries=(
                "nearest_orbit",
                "lossless_pruning, nearest_orbit",
                "block_regression",
                "taylor_inversion, nearest_orbit",
            ),
            combines="best",
            extends=True,
            last=_LAST,
        ),
        Attacker(
            name="standard-1",
            merges=_MERGES,
            recoveries=(*_ALONE, *_CHAINS),
            combines="best",
            extends=True,
            by_part=True,
            last=_LAST,
            trainings=_TRAININGS,
        ),
        Attacker(
            name="full-1",
            merges=_MERGES,
            recoveries=(*_ALONE, *_CHAINS),
            extends=True,
            by_part=True,
            trainings=_TRAININGS,
        ),
    )
}


def students(precision: Precision) -> tuple[Mapping[str, Any], ...]:
    """What an attacker does who only runs the release, as a plan lists it: students of it, to merge with."""
    computing = {} if precision == FULL else {"precision": precision}
    return (
        {"name": "distil", "method": "distil", "settings": computing},
        {"name": "distil, from its own model", "method": "distil", "settings": {"start": "source", **computing}},
    )


NEWEST = {"standard": "standard-1", "quick": "quick-1", "full": "full-1"}

DEFAULT = "standard"


def attacker_named(name: str, where: str) -> Attacker:
    """The attacker of a name, with a version or without.

    Raises:
        BadInput: there is none; ``where`` begins the message.
    """
    require_named(name, [*NEWEST, *ATTACKERS], "attacker", where)
    return ATTACKERS[NEWEST.get(name, name)]
