"""Tasks of every kind in a plan: read with their settings, digested with all they depend on, and scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.speakers import load_speaker, write_records, write_speaker
from unmergeable.data import DataSource
from unmergeable.errors import UnmergeableError
from unmergeable.evaluation.cells import digest_of
from unmergeable.evaluation.plans.audit_plan import parse_plan
from unmergeable.evaluation.plans.entries import TaskEntry
from unmergeable.evaluation.scoring import Checkpoint, Group, ScoredTask, score_points
from unmergeable.tasks import MultipleChoice, Perplexity, TaskData, TextToImage

QUESTIONS = [
    {"question": f"what is {number}?", "choices": ["a", "b", "so"], "answer": number % 3} for number in range(12)
]


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speakers")
    for seed, name in enumerate(("base", "mine", "theirs")):
        write_speaker(folder / name, "llama", seed=seed)
    write_records(folder / "questions.jsonl", QUESTIONS)
    write_records(folder / "texts.jsonl", [{"text": f"a text, and a number: {number}"} for number in range(12)])
    return folder


@pytest.fixture
def spoken() -> dict[str, Any]:
    """A plan for the speakers."""
    return {
        "base": "base",
        "experts": [
            {"name": "mine", "path": "mine", "task": "quiz"},
            {"name": "theirs", "path": "theirs", "task": "text"},
        ],
        "protect": {"expert": "mine", "methods": ["mergelock"]},
        "merges": ["task_arithmetic"],
        "threat_models": ["off_the_shelf"],
        "tasks": [
            {
                "name": "quiz",
                "kind": "multiple_choice",
                "data": "questions.jsonl",
                "settings": {"prompt": "question", "normalise": "tokens"},
            },
            {"name": "text", "kind": "perplexity", "validation": "texts.jsonl", "test": "texts.jsonl"},
        ],
    }


def test_kinds_and_their_settings(speakers: Path, spoken: dict[str, Any]) -> None:
    plan = parse_plan(spoken, speakers)
    assert plan.task("quiz").kind == MultipleChoice(prompt="question", normalise="tokens")
    assert plan.task("text").kind == Perplexity()
    paths = {"pipeline": "base", "measured_by": "mine"}
    spoken["tasks"][0] = {"name": "quiz", "kind": "text_to_image", "data": "questions.jsonl", "settings": paths}
    painted = parse_plan(spoken, speakers).task("quiz")
    assert painted.kind == TextToImage(pipeline=str(speakers / "base"), measured_by=str(speakers / "mine"))
    assert {speakers / "base", speakers / "mine"} <= set(painted.paths)


BROKEN: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("kind", lambda task: task.update(kind="choice"), "no kind of task is called 'choice'"),
    ("near", lambda task: task.update(kind="multiple_choise"), "did you mean 'multiple_choice'"),
    ("setting", lambda task: task["settings"].update(normalize="tokens"), "no setting 'normalize'; did you mean 'norm"),
    ("of another kind", lambda task: task.update(kind="perplexity"), "perplexity has no setting"),
    ("value", lambda task: task["settings"].update(normalise="bytes"), "normalise must be one of none, tokens"),
    ("head", lambda task: task.update(head="base"), "multiple_choice has no use for a head"),
    ("settings", lambda task: task.update(settings=["x"]), "settings: must be a mapping"),
    (
        "path",
        lambda task: task.update(kind="text_to_image", settings={"pipeline": "nowhere"}),
        "nowhere does not exist",
    ),
    ("missing path", lambda task: task.update(kind="text_to_image", settings={}), "pipeline is missing"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_what_is_wrong_is_said(
    speakers: Path, spoken: dict[str, Any], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    parse_plan(spoken, speakers)
    change(spoken["tasks"][0])
    with pytest.raises(UnmergeableError) as error:
        parse_plan(spoken, speakers)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_are_part_of_the_digest(speakers: Path, spoken: dict[str, Any]) -> None:
    def digest() -> str:
        plan = parse_plan(spoken, speakers)
        return ScoredTask.of(plan.task("quiz"), {path: str(path) for path in plan.paths}).digests["test"]

    first = digest()
    assert digest() == first
    spoken["tasks"][0]["settings"]["separator"] = ""
    assert digest() != first


def test_any_kind_is_scored(speakers: Path, spoken: dict[str, Any], tmp_path: Path) -> None:
    """By an attack's weights in the base's network, as by the kind itself with the expert's own network."""
    plan = parse_plan(spoken, speakers)
    digests = {path: digest_of(path) for path in plan.paths}

    def scored(entry: TaskEntry) -> ScoredTask:
        return ScoredTask.of(entry, digests)

    mine, base = (Checkpoint(speakers / name, digests[speakers / name]) for name in ("mine", "base"))
    group = Group(base, (mine,), None, (scored(plan.task("quiz")), scored(plan.task("text"))))
    cell = score_points(group, [None], "test", tmp_path).cells[None]
    network = load_speaker(speakers / "mine")
    text = TaskData("text", DataSource(speakers / "texts.jsonl", part="test", fractions=(0, 0.5, 0.5)), base.path, 4)
    expected = Perplexity().scorer(text, network).credits(network)
    assert sorted(cell.credits["text"]) == pytest.approx(sorted(expected), abs=1e-12)
    assert set(np.unique(cell.credits["quiz"])) <= {0.0, 1.0}
    assert 0 < len(cell.credits["quiz"]) < len(QUESTIONS)
