"""What the maps cover of the types that transformers registers for a task, and why the others have none.

``unsupported.json`` beside this file holds the reasons, by task and type, as the last derivation of everything gave
them; the page made from it is docs/model-types.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Literal

from unmergeable.architecture.derived import DerivedMap, known_map, shipped
from unmergeable.architecture.families import FAMILIES
from unmergeable.architecture.parts import part_of
from unmergeable.derivation.build import TASKS, registered
from unmergeable.derivation.derive import NO_ATTENTION

Level = Literal["declared", "whole", "part", "none"]
"""A family written by hand; a derived map with attention and feed-forwards; one with either; nothing."""

Reasons = Mapping[str, Mapping[str, str]]

HEADINGS = {
    "causal-lm": "Causal language models",
    "masked-lm": "Masked language models",
    "image-classification": "Image classifiers",
    "seq2seq": "Sequence to sequence",
    "speech": "Speech to text",
    "image-text": "Image and text",
    "diffusion": "Networks of diffusers, those tried",
}


def level(kind: str) -> Level:
    """What is known about a ``model_type``."""
    if kind in FAMILIES:
        return "declared"
    derived = known_map(kind) if kind in shipped() else None
    if derived is None:
        return "none"
    return "whole" if derived.attentions and derived.feed_forwards else "part"


def levels(task: str) -> dict[str, Level]:
    """What is known about every type of a task."""
    return {kind: level(kind) for kind in registered(task)}


def reason_of(derived: DerivedMap) -> str:
    """Why a map has only attention, or only feed-forwards."""
    missing = "attention" if not derived.attentions else "feed-forwards"
    texts = [text for name, text in derived.reasons.items() if not name.startswith("queries and keys")]
    if not derived.attentions:  # that there are none comes before what was tried
        texts = [derived.reasons[NO_ATTENTION], *texts] if NO_ATTENTION in derived.reasons else texts
    told = next(iter(texts), "")
    return f"no {missing}" + (f": {_short(told)}" if told else ": none of a known form was seen")


def short(outcome: Mapping[str, Any]) -> str:
    """The reason in what a derivation gave: its failure, or what its map lacks."""
    if "failure" in outcome:
        return _short(str(outcome["failure"]))
    return reason_of(DerivedMap.from_json(outcome))


def _short(text: str) -> str:
    text = " ".join(re.sub(r"^[\w.-]+: ", "", text).split())
    return text if len(text) <= 170 else text[:169] + "…"


def read_reasons() -> Reasons:
    found: Reasons = json.loads(files("unmergeable.derivation").joinpath("unsupported.json").read_text("utf-8"))
    return found


def counts(task: str) -> dict[str, int]:
    """How many types of a task there are, and how many of each level."""
    found = list(levels(task).values())
    return {"registered": len(found), **{name: found.count(name) for name in ("declared", "whole", "part", "none")}}


def with_towers(task: str) -> list[str]:
    """The types of a task whose derived maps have a tower for images or sound."""
    found = {kind: known_map(kind) for kind, known in levels(task).items() if known in {"whole", "part"}}
    return [kind for kind, derived in found.items() if derived is not None and has_tower(derived)]


def has_tower(derived: DerivedMap) -> bool:
    """Whether a map has a block of a tower for images or sound."""
    names = (str(template["name"]) for template in (*derived.attentions, *derived.feed_forwards))
    return any(part_of(name) in {"vision", "audio"} for name in names)


_INTRODUCTION = """\
Of the `model_type`s that transformers {version} registers for a task, these have a symmetry map: declared by hand, or
[derived by experiment](command-line.md#map) and proven: the function of a small random network stays the same to 1e-9
under random elements of every group, and changes under a control. A whole map has the value and output projections of
attention and the hidden units of feed-forwards; a map of one part protects only that. Channels between two convolutions
are hidden units, too, and what a depthwise convolution or a norm holds of each goes where it goes. A type may be
registered for several tasks."""


_MEASURED = """\
The owner's whole job, from `protect` to `nearest_orbit`, is measured through files on small networks of seventy-eight
of them ([figures](../benchmarks/results/derived_types.json), made by `python -m benchmarks.derived_types`), and 76 keep
every promise. Two do not keep one: `mergelock` changes attention alone, and so less than 15 % of the tensors of
`granitemoehybrid` and `qwen3_next`, most of whose layers have none."""


def page(reasons: Reasons) -> str:
    """docs/model-types.md."""
    return "\n".join(_page(reasons)) + "\n"


def _page(reasons: Reasons) -> Iterator[str]:
    yield "# Model types"
    yield ""
    yield "<!-- Written by `python -m unmergeable.derivation --ship`. -->"
    yield ""
    yield _INTRODUCTION.format(version=version("transformers"))
    yield ""
    yield "| task | registered | declared | derived, whole | derived, one part | none |"
    yield "|---|---|---|---|---|---|"
    for task in TASKS:
        row = counts(task)
        yield f"| {HEADINGS[task]} | " + " | ".join(str(number) for number in row.values()) + " |"
    yield ""
    yield "`unmergeable map TYPE` says what a derived map holds and what was left alone. Of the types that read images"
    count = len(with_towers("image-text"))
    yield f"with text, {count} have the tower for images in their maps; the towers of the others are left as they are:"
    yield "the experiment could not run them, or was not repeated since it can."
    yield ""
    yield from _MEASURED.split("\n")
    for task in TASKS:
        own = reasons.get(task, {})
        if own:
            yield ""
            yield f"## {HEADINGS[task]}: not supported, or in part"
            yield ""
            yield "| type | reason |"
            yield "|---|---|"
            for kind in sorted(own):
                yield f"| `{kind}` | {own[kind].replace('|', '/').replace('<', '‹')} |"
