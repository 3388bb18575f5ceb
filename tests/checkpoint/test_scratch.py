"""A folder for work in progress is known for what it is, and nobody else's is touched."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from unmergeable.checkpoint import scratch
from unmergeable.checkpoint.disk import _temporary
from unmergeable.errors import BadInput


def test_work_is_begun_taken_over_and_removed(tmp_path: Path) -> None:
    place = tmp_path / "out.steps"
    assert not scratch.is_begun(place, "a")
    with scratch.begun(place, "a"):
        (place / "1").mkdir()
    assert scratch.is_begun(place, "a")
    with scratch.begun(place, "a"):
        assert (place / "1").is_dir()
        scratch.remove(place)
    assert not list(tmp_path.iterdir())


def test_work_of_another_request_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "out.steps"
    with scratch.begun(place, "a"):
        pass
    for other in ("b", "", "aa"):
        with pytest.raises(BadInput, match="another request"):
            scratch.is_begun(place, other)
        with pytest.raises(BadInput, match="another request"), scratch.begun(place, other):
            pass
    assert (place / scratch.MARKER).read_text() == "a"


@pytest.mark.parametrize("left", ["an empty folder", "a temporary file"])
def test_what_a_run_left_before_it_said_whose_work_it_is(tmp_path: Path, left: str) -> None:
    place = tmp_path / "out.steps"
    place.mkdir()
    if left == "a temporary file":
        _temporary(place / scratch.MARKER, 0).write_text("a")
    assert not scratch.is_begun(place, "a")
    with scratch.begun(place, "a"):
        scratch.remove(place)
    assert not place.exists()


@pytest.mark.parametrize("what", ["file", "link", "foreign"])
def test_what_is_somebody_elses_is_refused(tmp_path: Path, what: str) -> None:
    place, elsewhere = tmp_path / "out.steps", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if what == "file":
        place.write_text("mine")
    elif what == "link":
        place.symlink_to(elsewhere)
    else:
        place.mkdir()
        (place / "mine").touch()
    with pytest.raises(BadInput, match="another request"):
        scratch.is_begun(place, "a")
    assert not list(elsewhere.iterdir())


def _try(place: Path, answers: multiprocessing.Queue[str]) -> None:
    try:
        with scratch.begun(place, "a"):
            answers.put("in")
    except BadInput as error:
        answers.put(str(error))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[str] = context.Queue()
    place = tmp_path / "out.steps"
    with scratch.begun(place, "a"):
        process = context.Process(target=_try, args=(place, answers))
        process.start()
        assert "another process" in answers.get(timeout=60)
        process.join()
    _try(place, answers)
    assert answers.get(timeout=60) == "in", "control"
