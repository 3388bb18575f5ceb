"""Model cards: the front matter of a README in YAML, and sections of it that a program keeps.

A section stands between two comments, and is replaced between them; everything else of a card stays as it is, byte for
byte. Entries are added to the front matter as lines at its end, and only those that it does not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from unmergeable.errors import BadInput
from unmergeable.yaml_text import parse_yaml

_FRONT = re.compile(r"\A(\ufeff?---[ \t]*\r?\n)(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
_PLAIN = re.compile(r"[A-Za-z0-9][\w./-]*")


def front_matter(text: str, where: str) -> Mapping[str, Any]:
    """What the front matter of a card says; nothing where there is none.

    Raises:
        BadInput: it is no YAML, or no mapping.
    """
    found = _FRONT.match(text)
    document = parse_yaml(found[2], f"the front matter of {where}") if found else None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise BadInput(f"the front matter of {where} is no mapping of names to values; correct it there.")
    return {str(name): value for name, value in document.items()}


def with_entries(text: str, entries: Mapping[str, str], where: str) -> str:
    """The card with these entries in its front matter; those that it has stay as they are.

    Raises:
        BadInput: as :func:`front_matter`, or the front matter is written so that no line can be added.
    """
    before = front_matter(text, where)
    added = {name: value for name, value in entries.items() if name not in before}
    if not added:
        return text
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = "".join(f"{name}: {_scalar(value)}{newline}" for name, value in added.items())
    found = _FRONT.match(text)
    if found is None:
        return f"---{newline}{lines}---{newline}{newline}{text}"
    end = found.end(2)
    result = f"{text[:end]}{lines}{text[end:]}"
    try:
        is_as_meant = front_matter(result, where) == {**before, **added}
    except BadInput:
        is_as_meant = False
    if not is_as_meant:
        wanted = ", ".join(f"{name}: {_scalar(value)}" for name, value in added.items())
        raise BadInput(f"the front matter of {where} takes no more lines as it is written; add there: {wanted}.")
    return result


def with_section(text: str, name: str, section: str, where: str) -> str:
    """The card with this section between the comments of its ``name``, or at its end where it has none.

    Raises:
        BadInput: one comment is there without the other, or more than once.
    """
    begin, end = f"<!-- unmergeable: {name} -->", f"<!-- end of unmergeable: {name} -->"
    newline = "\r\n" if "\r\n" in text else "\n"
    block = newline.join([begin, *section.strip("\n").split("\n"), end])
    counts = text.count(begin), text.count(end)
    if counts == (0, 0):
        gap = "" if not text else newline if text.endswith(newline) else newline * 2
        return f"{text}{gap}{block}{newline}"
    first, last = text.find(begin), text.find(end)
    if counts != (1, 1) or last < first:
        raise BadInput(f"{where} has not one {begin} with one {end} after it; remove these lines and write it again.")
    return f"{text[:first]}{block}{text[last + len(end) :]}"


def _scalar(value: str) -> str:
    is_plain = _PLAIN.fullmatch(value) is not None and parse_yaml(value, "the value") == value
    return value if is_plain else "'" + value.replace("'", "''") + "'"
