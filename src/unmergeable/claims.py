"""What this project may say of a protection: sentences made from its own audits, and from nothing else.

``claims.json`` holds D* of every audited protection, with its interval, for each threat model and each kind of model.
``python -m benchmarks.claims`` makes it from the committed audits, and tests compare the two. Whoever states what a
protection stops (the terminal, a manifest, a page of the documentation) asks here, so that no sentence says more than
was measured.

D* is 1 where the best attack found gets no more of the skill than somebody without the release, and 0 where it gets
as much as from the unprotected expert.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files

THREAT_MODELS: Mapping[str, str] = {
    "off_the_shelf": "off-the-shelf merging",
    "white_box": "an attacker who holds the base and knows the method",
    "few_shot": "an attacker who has labelled examples as well",
    "unlabelled": "an attacker who has unlabelled examples as well",
}
"""The attackers, weakest first; each may do what those before it may. What they are called in a sentence."""

STOPS, HINDERS = 0.8, 0.2
"""Lower end of the interval of D* from which a protection is said to stop an attacker, and to hinder one."""

JUDGEMENTS = ("stops", "hinders", "is not shown to stop", "does not stop", "cannot be judged against")
"""What can be said of a protection and an attacker; the third is a high D* whose interval reaches too low."""

LEGEND = "D* is 1 where the attacker gets nothing of the skill, and 0 where it gets as much as without a protection."

EFFORT = frozenset({"examples", "steps", "coefficients", "precision"})
"""Settings that say how long a method works, how, and on how many examples and siblings: they make no other of it."""

Setting = str | int | float | bool


@dataclass(frozen=True)
class Study:
    """One audit: which model was protected, and what was at stake.

    Attributes:
        name: of the committed result, ``benchmarks/results/NAME.json``.
        kind: "language_model", "vision", "text", "encoder_decoder" or "diffusion".
        model: as a sentence calls it.
        parameters: of the model.
        victim_task, attacker_task: what the protected expert knows, and what the attacker's own model knows.
        date: on which the result was committed, year-month-day.
    """

    name: str
    kind: str
    model: str
    parameters: int
    victim_task: str
    attacker_task: str
    date: str


@dataclass(frozen=True)
class DStar:
    """D* against the strongest attack found within one threat model, and its 95 % interval; None: not known.

    ``is_recognised``: whether the attacker saw what was done, and tried all that we know. Where not, somebody may get
    through who looks longer.
    """

    value: float | None
    low: float | None
    high: float | None
    is_recognised: bool = True

    @property
    def judgement(self) -> str:
        """One of :data:`JUDGEMENTS`, from the lower end of the interval: what may be luck is not called protection."""
        if self.value is None or self.low is None or math.isnan(self.value):
            return "cannot be judged against"
        if self.low >= STOPS and self.is_recognised:
            return "stops"
        if self.low >= HINDERS and self.is_recognised:
            return "hinders"
        return "is not shown to stop" if self.value >= HINDERS else "does not stop"


@dataclass(frozen=True)
class Measurement:
    """One protection in one audit.

    Attributes:
        settings: those that differ from the method's defaults and change what it protects; empty for the defaults.
        utility_loss: points (of 100) that the protected model loses on its own task.
        d_star: by threat model, weakest attacker first.
    """

    study: Study
    method: str
    settings: Mapping[str, Setting]
    utility_loss: float
    d_star: Mapping[str, DStar] = field(default_factory=dict)


@functools.cache
def measurements() -> tuple[Measurement, ...]:
    """Every protection of every audit, in the order of the audits."""
    studies = json.loads(files("unmergeable").joinpath("claims.json").read_text(encoding="utf-8"))
    return tuple(
        Measurement(
            study=Study(**study["study"]),
            method=entry["method"],
            settings=entry["settings"],
            utility_loss=entry["utility_loss"],
            d_star={threat_model: DStar(*found) for threat_model, found in entry["d_star"].items()},
        )
        for study in studies
        for entry in study["protections"]
    )


def measured(
    method: str, kind: str | None = None, settings: Mapping[str, object] | None = None
) -> tuple[Measurement, ...]:
    """The measurements that come nearest to ``method`` at these settings: at most one for each audit.

    Args:
        method: name of a protection.
        kind: of the model (see :class:`Study`); None, or one that was not audited, for every kind.
        settings: those that differ from the defaults of the method.
    """
    wanted = settings or {}
    fitting = [
        entry
        for entry in measurements()
        if entry.method == method and all(wanted.get(name) == value for name, value in entry.settings.items())
    ]
    fitting = [entry for entry in fitting if entry.study.kind == kind] or fitting
    nearest = max((len(entry.settings) for entry in fitting), default=0)
    return tuple(entry for entry in fitting if len(entry.settings) == nearest)


def limits(method: str, kind: str | None = None, settings: Mapping[str, object] | None = None) -> str:
    """What a protection stops, and what it does not, in one or two sentences for a terminal or a manifest.

    Attackers are named up to the first who knows the method and whom the protection stops on no model; those after it
    can do as much. Whoever only merges is never the last: that a protection fails against less does not tell an owner
    what it is worth against more.
    Arguments as for :func:`measured`.
    """
    entries = measured(method, kind, settings)
    if not entries:
        return f"No audit here says what {method} stops; `unmergeable audit` measures it."
    sentences: list[str] = []
    models: list[str] = []
    for threat_model in THREAT_MODELS:
        found = {entry.study.model: entry.d_star[threat_model] for entry in entries if threat_model in entry.d_star}
        if not found:
            break
        sentences.append(_sentence("It" if sentences else method, threat_model, found, list(found) == models))
        models = list(found)
        if threat_model != "off_the_shelf" and {d_star.judgement for d_star in found.values()} == {"does not stop"}:
            break
    other = [
        f"{name}={value}" for name, value in (settings or {}).items() if name not in EFFORT | {*entries[0].settings}
    ]
    if other:
        sentences.append(f"None of these audits had {_listed(other)}.")
    return " ".join(sentences)


def overall() -> str:
    """Which protections, at their defaults, stop which attackers, a sentence for each attacker."""
    sentences = []
    methods = dict.fromkeys(entry.method for entry in measurements())
    for threat_model, whom in THREAT_MODELS.items():
        everywhere, somewhere, audited = [], [], False
        for method in methods:
            judged = [
                entry.d_star[threat_model].judgement for entry in measured(method) if threat_model in entry.d_star
            ]
            audited = audited or bool(judged)
            if judged and set(judged) == {"stops"}:
                everywhere.append(method)
            elif "stops" in judged:
                somewhere.append(method)
        if not audited:
            continue
        clauses = [f"by {_listed(everywhere)} on every model that was audited with it"] if everywhere else []
        clauses += [f"by {_listed(somewhere)} on some models and not on others"] if somewhere else []
        if clauses:
            sentences.append(f"{whom[0].upper()}{whom[1:]} is stopped {_listed(clauses)}.")
        else:
            sentences.append(f"No audited protection stops {whom}.")
    return " ".join(sentences)


def _sentence(subject: str, threat_model: str, found: Mapping[str, DStar], is_repeated: bool) -> str:
    """``is_repeated``: the models are those of the sentence before."""
    clauses: list[str] = []
    for judgement in JUDGEMENTS:
        alike = {model: d_star for model, d_star in found.items() if d_star.judgement == judgement}
        if alike:
            whom = "it" if clauses else THREAT_MODELS[threat_model]
            clauses.append(
                f"{judgement} {whom} on {_on(alike, 'any of them' if is_repeated and alike == found else '')}"
            )
    return f"{subject} {_listed(clauses)}."


def _on(found: Mapping[str, DStar], together: str) -> str:
    """The models with D*: one range for all, or each with its own where the interval is what matters."""
    if any(d_star.judgement in ("hinders", "is not shown to stop") for d_star in found.values()):
        return _listed(
            [f"{model} (D* {d_star.value:.2f}, interval from {d_star.low:.2f})" for model, d_star in found.items()]
        )
    values = sorted(d_star.value for d_star in found.values() if d_star.value is not None)
    models = together if together and len(found) > 1 else _listed(list(found))
    return f"{models} (D* {_span(values)})" if values else models


def _span(values: list[float]) -> str:
    low, high = f"{values[0]:.2f}", f"{values[-1]:.2f}"
    return low if low == high else f"{low} to {high}"


def _listed(texts: list[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
