"""Front matter and sections of a card: what is added, and that nothing else moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmergeable.checkpoint.card import front_matter, with_entries, with_section
from unmergeable.errors import BadInput

CARD = "---\nlicense: mit\ntags:\n- a  # kept\n---\n# Name\n\nText.\n"


def test_entries_come_to_the_end_of_the_front_matter_and_nothing_else_moves() -> None:
    written = with_entries(CARD, {"base_model": "owner/base", "license": "apache-2.0"}, "README.md")
    assert written == CARD.replace("kept\n---", "kept\nbase_model: owner/base\n---")
    assert front_matter(written, "README.md") == {"license": "mit", "tags": ["a"], "base_model": "owner/base"}


def test_a_card_without_front_matter_gets_one() -> None:
    assert with_entries("# Name\n", {"base_model": "a/b"}, "x") == "---\nbase_model: a/b\n---\n\n# Name\n"
    assert with_entries("# Name\n", {}, "x") == "# Name\n"


def test_line_ends_of_windows_stay() -> None:
    card = CARD.replace("\n", "\r\n")
    written = with_section(with_entries(card, {"base_model": "a/b"}, "x"), "p", "one\n\ntwo", "x")
    assert "\n" not in written.replace("\r\n", "")


def test_a_line_of_dashes_in_the_text_is_no_front_matter() -> None:
    text = "# Name\n\n---\nlicense: mit\n---\n"
    assert front_matter(text, "x") == {}
    assert with_entries(text, {"base_model": "a/b"}, "x").endswith(text)


@pytest.mark.parametrize("value", ["a/b", "no", "1.0", "it's: so", "null", "#"])
def test_values_are_read_back_as_text(value: str) -> None:
    """Plain, YAML would take some of these for something else."""
    for card in (CARD, "# Name\n"):
        assert front_matter(with_entries(card, {"x": value}, "x"), "x")["x"] == value


@pytest.mark.parametrize("front", ["{license: mit}", "license: mit\n...", "- a"])
def test_front_matter_that_takes_no_line_is_refused_with_the_lines(front: str) -> None:
    with pytest.raises(BadInput, match=r"base_model: a/b|no mapping"):
        with_entries(f"---\n{front}\n---\n", {"base_model": "a/b"}, "x")


def test_broken_front_matter_is_told_in_one_line() -> None:
    with pytest.raises(BadInput, match="not valid YAML") as caught:
        front_matter("---\na: [\n---\n", "README.md")
    assert "\n" not in str(caught.value)


@given(
    before=st.text(alphabet="ab \n#-", max_size=20),
    after=st.text(alphabet="ab \n#-", max_size=20),
    sections=st.lists(st.text(alphabet="xy \n#", min_size=1, max_size=20), min_size=1, max_size=3),
)
def test_a_section_is_replaced_and_the_rest_stays(before: str, after: str, sections: list[str]) -> None:
    card = with_section(before, "p", "first", "x")
    assert card.startswith(before)
    card += after
    for section in sections:
        card = with_section(card, "p", section, "x")
        assert with_section(card, "p", section, "x") == card
    assert card.startswith(before)
    assert card.endswith(after)
    assert card.count("unmergeable: p") == 2


def test_sections_of_other_names_stay() -> None:
    card = with_section(with_section("", "p", "one", "x"), "q", "two", "x")
    assert "one" in with_section(card, "q", "three", "x")


@pytest.mark.parametrize(
    "card",
    [
        "<!-- unmergeable: p -->\n",
        "<!-- end of unmergeable: p -->\n<!-- unmergeable: p -->\n",
        "<!-- unmergeable: p -->\n<!-- end of unmergeable: p -->\n" * 2,
    ],
)
def test_comments_that_do_not_pair_are_refused(card: str) -> None:
    with pytest.raises(BadInput, match="remove these lines"):
        with_section(card, "p", "text", "x")
