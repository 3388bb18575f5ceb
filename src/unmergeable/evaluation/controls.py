"""What must hold in every audit, or its figures mean nothing: controls, each of which can fail.

Nobody can show that an attacker is the strongest. That it is strong enough to undo what is known to be nothing, and
honest enough to report a protection that is complete, can be shown, and is shown here in every audit anew.

    scale                 a shrunk task vector                             |D*| <= 0.1   if luck does not explain it
    planted               the expert in another exact form, drawn          D* <= 0.05  white_box and beyond
    planted_structure     the same in another structure as well            D* <= 0.05  white_box and beyond
    nothing               the base as if it were a release                 D* >= 0.95    if luck does not explain it
    exact releases        outputs equal to the expert's within rounding    D* <= 0.1   white_box and beyond
    students              of the expert itself, share of a merge's gain    >= 0.5      black_box
    planted keys          what nearest_orbit leaves of the distance        <= 1.02, or what the key itself leaves

``scale`` and ``nothing`` compare different merges, whose scores on few test examples differ by luck. They fail where
D* is beyond the bound by more than two standard errors of that luck; up to there they are undecided, and nobody is said
to be stopped. The luck of the selection is no excuse: a menu that is too small makes it. The others compare merges of
the same function: D* is the lesser of that at one share of kept skill and that over all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from unmergeable.evaluation.flags import STANDARD_ERRORS
from unmergeable.evaluation.models import Variant
from unmergeable.evaluation.names import CONTROLS, IDENTITY, NOTHING, PLANTED, PLANTED_STRUCTURE, SCALE
from unmergeable.evaluation.results import Control, ProtectionResult, Trial, Verdicts
from unmergeable.evaluation.threat_models import ThreatModel
from unmergeable.evaluation.worst_case import SMALL_DENOMINATOR

SCALE_BOUND, PLANTED_BOUND, NOTHING_BOUND, EXACT_BOUND = 0.1, 0.05, 0.95, 0.1

STUDENTS_BOUND = 0.5
"""Of what merging the unprotected expert gains: students that learn less are no limit to judge weights against."""

KEY_BOUND = 1.02
"""Times what the key leaves of the distance to the base: what a recovery that finds the key leaves at most."""

LUCK_OF_TRAINING = 0.02
"""Share of right answers by which two trainings differ whose starts differ by a rounding."""

Measure = Callable[[ThreatModel, Trial], float | None]


def controls(protections: Mapping[str, ProtectionResult], variants: Sequence[Variant]) -> tuple[Control, ...]:
    """All controls of an audit, from its verdicts and the models that were made."""
    planted = (
        (PLANTED, "the expert in another exact form is no protection"),
        (PLANTED_STRUCTURE, "the expert in another exact form and structure is no protection"),
    )
    refused = {variant.protection: variant.refusal for variant in variants if variant.checkpoint is None}
    return (
        bounded(protections, SCALE, SCALE_BOUND, "a shrunk task vector is no protection"),
        *(
            _undone(name, protections[name], PLANTED_BOUND, f"largest D*: {what}")
            if name in protections
            else _left_out(name, refused[name])
            for name, what in planted
            if name in protections or name in refused
        ),
        _adds_nothing(protections[NOTHING]),
        *_exact_releases(protections, variants),
        *_students(protections[IDENTITY]),
        *(control for variant in variants if (control := _planted_key(variant, variants)) is not None),
    )


def doubted(protections: Mapping[str, ProtectionResult]) -> dict[str, ProtectionResult]:
    """The same, where a control is undecided: every trial says so."""

    def flagged(trial: Trial) -> Trial:
        return replace(trial, flags=(*trial.flags, "undecided_control"))

    def of(verdicts: Verdicts) -> Verdicts:
        worst = None if verdicts.worst is None else flagged(verdicts.worst)
        return replace(verdicts, worst=worst, trials=tuple(map(flagged, verdicts.trials)))

    return {
        name: replace(protection, tiers={model: of(verdicts) for model, verdicts in protection.tiers.items()})
        for name, protection in protections.items()
    }


def bounded(protections: Mapping[str, ProtectionResult], name: str, bound: float, what: str) -> Control:
    """The control that a protection of this name has a D* of at most ``bound``, in either direction."""
    value = max(_values(protections[name], _distance_from_nothing), default=None)
    surely = max(_values(protections[name], _surely_from_nothing), default=None)
    return Control(name=name, what=f"largest |D*|: {what}", value=value, bound=bound, **_decided(value, surely, bound))


def _decided(value: float | None, surely: float | None, bound: float) -> dict[str, bool]:
    """Whether a control holds whose ``value`` may be ``bound`` at most; whatever the luck, it is ``surely`` or more."""
    if value is None or surely is None:
        return {"passed": False}
    return {"passed": surely <= bound, "undecided": surely <= bound < value}


def _undone(name: str, protection: ProtectionResult, bound: float, what: str) -> Control:
    """The control that an attacker who may undo a protection leaves nothing of it."""
    value = max(_values(protection, _left_of_it, ThreatModel.WHITE_BOX), default=None)
    return Control(name=name, what=what, value=value, bound=bound, passed=value is not None and value <= bound)


def _adds_nothing(protection: ProtectionResult) -> Control:
    value = min(_values(protection, _hidden), default=None)
    surely = min(_values(protection, _surely_hidden), default=None)
    return Control(
        name=NOTHING,
        what="smallest D*, at least: the base holds nothing that could be stolen",
        value=value,
        bound=NOTHING_BOUND,
        **_decided(_negative(value), _negative(surely), -NOTHING_BOUND),
    )


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _left_out(name: str, reason: str) -> Control:
    return Control(name=name, what=f"not made: {reason}", value=None, bound=None, passed=True)


def _exact_releases(protections: Mapping[str, ProtectionResult], variants: Sequence[Variant]) -> Iterator[Control]:
    """Whoever computes what the expert computes gives all of it away: a release that still seems protected was not
    understood by this attacker."""
    exact = dict.fromkeys(
        variant.protection for variant in variants if variant.recovery is None and _computes_the_same(variant)
    )
    for name in exact:
        if name not in CONTROLS:
            what = "largest D*: it computes what the expert computes, so this attacker is too weak for it"
            control = _undone(f"exact: {name}", protections[name], EXACT_BOUND, what)
            if control.value is not None:
                yield control


def _students(unprotected: ProtectionResult) -> Iterator[Control]:
    """Running the expert gives away what it can do, whatever its weights are like; a student that does not learn it
    would make every release look as if its weights gave much, or nothing could be had."""
    if ThreatModel.BLACK_BOX not in unprotected.tiers:
        return
    merged = {
        trial.rider: trial
        for model, verdicts in unprotected.tiers.items()
        if model.merges and not model.trains
        for trial in verdicts.trials
    }
    gains = [
        (trial.protected - best.without_victim) / (best.unprotected - best.without_victim)
        for trial in unprotected.tiers[ThreatModel.BLACK_BOX].trials
        if (best := merged.get(trial.rider)) is not None
        and best.unprotected is not None
        and best.unprotected - best.without_victim > SMALL_DENOMINATOR
    ]
    if gains:
        yield Control(
            name="students",
            what="smallest share of a merge's gain, at least: who runs the expert can learn from it",
            value=min(gains),
            bound=STUDENTS_BOUND,
            passed=min(gains) >= STUDENTS_BOUND,
        )


def _computes_the_same(variant: Variant) -> bool:
    gap, bound = variant.facts.get("output_gap"), variant.facts.get("output_gap_bound")
    return variant.has_key or (gap is not None and bound is not None and gap <= bound)


def _values(protection: ProtectionResult, measure: Measure, least: ThreatModel | None = None) -> list[float]:
    """What is measured in every trial of attackers with all that ``least`` has; where there is enough to defend in some
    trials, in those alone: of nothing there is no share."""
    trials = [
        (model, trial)
        for model, verdicts in protection.tiers.items()
        if model.merges and (least is None or model.includes(least))
        for trial in verdicts.trials
    ]
    enough = [pair for pair in trials if not pair[1].is_denominator_small]
    return [value for pair in enough or trials if (value := measure(*pair)) is not None]


def _distance_from_nothing(model: ThreatModel, trial: Trial) -> float | None:
    return None if trial.d_star is None else max(0.0, abs(trial.d_star) - _luck(model, trial))


def _surely_from_nothing(model: ThreatModel, trial: Trial) -> float | None:
    """The same less what the luck of the test examples may be."""
    found = _distance_from_nothing(model, trial)
    return None if found is None else max(0.0, found - _luck_of_test(trial))


def _left_of_it(model: ThreatModel, trial: Trial) -> float | None:
    """D*, at one share of kept skill or over all of them, whichever is less.

    Merges of one function in other weights differ by rounding, and one image then decides which of them keeps a share.
    What was not undone is left over all shares.
    """
    if trial.d_star is None:
        return None
    least = trial.d_star if trial.area is None else min(trial.d_star, trial.area)
    return max(0.0, least - _luck(model, trial))


def _hidden(model: ThreatModel, trial: Trial) -> float | None:
    return None if trial.d_star is None else min(1.0, trial.d_star + _luck(model, trial))


def _surely_hidden(model: ThreatModel, trial: Trial) -> float | None:
    """The same and what the luck of the test examples may be."""
    found = _hidden(model, trial)
    return None if found is None else min(1.0, found + _luck_of_test(trial))


def _luck_of_test(trial: Trial) -> float:
    return STANDARD_ERRORS * (trial.test_error or 0.0)


def _luck(model: ThreatModel, trial: Trial) -> float:
    """What two trainings end apart by luck alone, of attackers who train."""
    if not model.trains or trial.unprotected is None:
        return 0.0
    return LUCK_OF_TRAINING / (trial.unprotected - trial.without_victim)


def _planted_key(variant: Variant, variants: Sequence[Variant]) -> Control | None:
    """How near a fit of changes of basis came; only the one over the largest group must find every planted key.

    Weights that were stored with rounding are not at the expert's own place even with the key in hand: what the key
    leaves is measured, and no attacker is asked for less.
    """
    origin = None if variant.recovery is None else _distance_of_expert(variants, variant.recovery)
    after = variant.facts.get("distance_after")
    if not variant.has_key or variant.recovery is None or not origin or after is None:
        return None
    must_find = variant.facts.get("method") == "nearest_orbit"
    bound = KEY_BOUND * max(1.0, _left_by_key(variant, variants)) if must_find else None
    return Control(
        name=f"{variant.recovery} on {variant.label}",
        what="distance to the base after the recovery, in units of the unprotected expert's",
        value=after / origin,
        bound=bound,
        passed=bound is None or after / origin <= bound,
    )


def _left_by_key(variant: Variant, variants: Sequence[Variant]) -> float:
    """The distance to the base that the owner gets to with the key, in units of the unprotected expert's."""
    released = (other for other in variants if other.label == variant.label and other.recovery is None)
    return next((float(other.facts.get("distance_with_key") or 1.0) for other in released), 1.0)


def _distance_of_expert(variants: Sequence[Variant], recovery: str) -> float | None:
    """The unprotected expert's distance, which the same recovery reports when it is run on the expert."""
    for variant in variants:
        if variant.protection == IDENTITY and variant.recovery == recovery:
            distance: float | None = variant.facts.get("distance_before")
            return distance
    return None
