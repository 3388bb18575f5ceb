"""The partial folder: one writer, nothing foreign touched, a journal that survives being torn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from unmergeable.checkpoint.manifest import FileRecord
from unmergeable.checkpoint.partial import (
    PartialFolder,
    Safe,
    completed_earlier,
    partial_of,
    require_absent,
    require_creatable,
    require_outside,
)
from unmergeable.errors import BadInput, CheckpointError

RECORD = FileRecord("a.safetensors", 10, "aa")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def begin(out: Path) -> None:
    with PartialFolder(out, "token") as folder:
        (folder.files / "a.safetensors").write_text("whole")
        folder.note_finished(RECORD)
        folder.note_safe("b.safetensors", Safe(1, "b1"))
        folder.note_safe("b.safetensors", Safe(2, "b2"))
        folder.note_safe("c.safetensors", Safe(3, None))
        folder.note_input("/in/a.safetensors", FileRecord("a.safetensors", 7, xxh3_128="in"))


def test_a_journal_is_read_back(out: Path) -> None:
    begin(out)
    with PartialFolder(out, "token") as folder:
        assert folder.done.finished == {"a.safetensors": RECORD}
        assert folder.done.begun == {"b.safetensors": Safe(2, "b2"), "c.safetensors": Safe(3, None)}
        assert folder.done.inputs == {"/in/a.safetensors": FileRecord("a.safetensors", 7, xxh3_128="in")}
        assert (folder.files / "a.safetensors").read_text() == "whole"


def test_another_token_discards_what_is_there(out: Path) -> None:
    begin(out)
    with PartialFolder(out, "other work") as folder:
        assert folder.done.finished == {}
        assert list(folder.files.iterdir()) == []
        folder.note_finished(RECORD)
    with PartialFolder(out, "other work") as folder:
        assert folder.done.finished == {"a.safetensors": RECORD}


def test_a_torn_line_costs_only_itself(out: Path) -> None:
    begin(out)
    journal = partial_of(out) / "journal"
    whole = journal.read_bytes()
    lines = whole.count(b"\n")
    for cut in range(0, len(whole), 11):
        journal.write_bytes(whole[:cut])
        with PartialFolder(out, "token") as folder:
            folder.note_safe("c.safetensors", Safe(3, "c"))
        with PartialFolder(out, "token") as folder:
            # Unless even the first line is torn, every complete line counts, and so does what was added.
            assert folder.done.begun["c.safetensors"] == Safe(3, "c")
            assert (folder.done.finished == {"a.safetensors": RECORD}) == (whole[:cut].count(b"\n") >= 2)
        assert journal.read_bytes().count(b"\n") <= lines + 1


def test_commit_leaves_the_result_alone(out: Path) -> None:
    begin(out)
    with PartialFolder(out, "token") as folder:
        folder.commit()
    assert [path.name for path in out.iterdir()] == ["a.safetensors"]
    assert not partial_of(out).exists()


def test_a_result_that_appeared_meanwhile_is_not_replaced(out: Path) -> None:
    with PartialFolder(out, "token") as folder:
        out.symlink_to("nowhere")
        with pytest.raises(BadInput, match="exists"):
            folder.commit()
    with pytest.raises(BadInput, match="exists"):
        PartialFolder(out, "token")


def test_two_writers(out: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from unmergeable.checkpoint.partial import PartialFolder
from unmergeable.errors import BadInput
try:
    PartialFolder(Path({str(out)!r}), "token")
except BadInput as error:
    print(error)
"""
    with PartialFolder(out, "token"):
        with pytest.raises(BadInput, match="being written by another process"):
            PartialFolder(out, "token")
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert "being written by another process" in other.stdout
    PartialFolder(out, "token").close()  # the control: once released, it can be taken


def test_foreign_files_are_neither_deleted_nor_written_through(out: Path, tmp_path: Path) -> None:
    partial = partial_of(out)
    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="somebody else"):
        PartialFolder(out, "token")
    assert (partial / "thesis.tex").exists()

    (partial / "thesis.tex").unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("checkpoint", "lock", "journal"):
        (partial / name).symlink_to(elsewhere)
        with pytest.raises(BadInput, match="somebody else"):
            PartialFolder(out, "token")
        (partial / name).unlink()
    partial.rmdir()
    partial.symlink_to(elsewhere)
    with pytest.raises(BadInput, match="somebody else"):
        PartialFolder(out, "token")
    assert list(elsewhere.iterdir()) == []


def test_what_is_no_longer_wanted_is_removed(out: Path) -> None:
    begin(out)
    with PartialFolder(out, "token") as folder:
        (folder.files / "tokenizer.json").touch()
        (folder.files / "nested").mkdir()
        folder.remove_all_but({"a.safetensors"})
        assert [path.name for path in folder.files.iterdir()] == ["a.safetensors"]


def test_a_journal_of_nonsense(out: Path) -> None:
    begin(out)
    journal = partial_of(out) / "journal"
    journal.write_bytes(journal.read_bytes() + b'{"finished": "x"}\n')
    with pytest.raises(CheckpointError, match="journal"):
        PartialFolder(out, "token")


def test_a_result_without_its_journal_is_nobodys(out: Path) -> None:
    """Killed before the very last call, an empty folder stays beside OUT: it is removed, and OUT refused."""
    out.mkdir()
    partial_of(out).mkdir()
    with pytest.raises(BadInput, match="exists"):
        completed_earlier(out, "token")
    assert not partial_of(out).exists()
    assert not completed_earlier(out.with_name("another"), "token")


def test_a_result_beside_unfinished_work_is_refused(out: Path) -> None:
    begin(out)
    out.mkdir()
    for check in (require_absent, require_creatable, lambda path: completed_earlier(path, "token")):
        with pytest.raises(BadInput, match="exists"):
            check(out)
    assert (partial_of(out) / "checkpoint" / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/out", "its parent folder .*absent does not exist"),
        ("..", "no name of a folder"),
        ("with a null \0 byte", "no name of a folder"),
        ("x" * 250, "too long: names here have at most 255 bytes"),
        ("\N{GREEK SMALL LETTER ALPHA}" * 125, "too long"),
    ],
)
def test_names_that_no_folder_can_have_are_refused_at_once(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        require_creatable(tmp_path / name)


def test_names_that_a_folder_can_have(tmp_path: Path) -> None:
    longest = tmp_path / ("x" * 247)
    require_creatable(longest)
    with PartialFolder(longest, "token") as folder:
        folder.commit()
    with pytest.raises(BadInput, match="exists"):
        require_creatable(longest)


def test_output_and_inputs_do_not_lie_in_one_another(tmp_path: Path) -> None:
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("base")
    for out in (tmp_path / "base" / "out", tmp_path / "base", tmp_path / "link" / "out"):
        with pytest.raises(BadInput, match="lie inside each other"):
            require_outside(out, tmp_path / "other", tmp_path / "base")
    with pytest.raises(BadInput, match="lie inside each other"):
        require_outside(tmp_path / "base", tmp_path / "base" / "nested")
    require_outside(tmp_path / "base2", tmp_path / "base", tmp_path / "other")
