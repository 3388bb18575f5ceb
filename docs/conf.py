"""The site of the documentation: ``make docs``, or ``python -m sphinx -W --keep-going docs build/site``.

Sphinx with MyST and Furo, because docstrings here refer to each other in Sphinx's own way (``:func:`merge```), which
autodoc resolves and checks, and because its search and theme need no network. Pages stay Markdown that can be read
where it lies; pages from outside ``docs/`` (committed results, the changelog) are copied into ``docs/outside/``.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from pathlib import Path

from sphinx.application import Sphinx

import unmergeable

project = "unmergeable"
author = "The unmergeable authors"
release = importlib.metadata.version("unmergeable")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
highlight_language = "none"
suppress_warnings = ["myst.header"]  # committed tables begin with whatever heading they have

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 90
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "unmergeable"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

# The names of the package are imported when they are asked for; autodoc only sees what is there.
for name in unmergeable.__all__:
    setattr(unmergeable, name, getattr(unmergeable, name))

DOCS = Path(__file__).parent
ROOT = DOCS.parent
COPIES = DOCS / "outside"
OUTSIDE = {
    ROOT / "CHANGELOG.md": COPIES / "changelog.md",
    ROOT / "CONTRIBUTING.md": COPIES / "contributing.md",
    ROOT / "plans" / "README.md": COPIES / "plans.md",
    **{
        path: COPIES / path.name
        for place in ("benchmarks", "plans")
        for path in (ROOT / place / "results").glob("*.md")
    },
}
"""Pages that lie elsewhere, and where their copies do."""

_LITERAL = re.compile(r"(`+[^`]*`+)")
_LINK = re.compile(r"(\]\()([^)\s#:]+)")


def with_links(text: str, page: Path, copy: Path) -> str:
    """The text of ``page`` with links as they must be in ``copy``, to copies where there are any."""

    def link(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / match[2]))
        return match[1] + os.path.relpath(OUTSIDE.get(target, target), copy.parent) if target.exists() else match[0]

    return _LINK.sub(link, text)


def copy_outside(app: Sphinx) -> None:
    shutil.rmtree(COPIES, ignore_errors=True)
    COPIES.mkdir()
    for page, copy in OUTSIDE.items():
        text = page.read_text(encoding="utf-8")
        title = "" if text.startswith("# ") else f"# {page.stem.replace('_', ' ').capitalize()}\n\n"
        copy.write_text(title + with_links(text, page, copy), encoding="utf-8")


def link_to_copies(app: Sphinx, docname: str, source: list[str]) -> None:
    page = DOCS / f"{docname}.md"
    if page.parent != COPIES:
        source[0] = with_links(source[0], page, page)


def as_markup(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings here indent formulas and examples without ``::``, and write |x| for a magnitude."""
    before = ""
    for number, line in enumerate(lines):
        begins = line.startswith("    ") and number > 0 and not lines[number - 1].strip()
        if begins and before and before[0] not in " .:":
            lines[number - 1] = "\n::\n"
        if line.strip():
            before = line
        if not line.startswith("    "):
            parts = _LITERAL.split(line)
            parts[::2] = [part.replace("|", "\\|") for part in parts[::2]]
            lines[number] = "".join(parts)
    lines[:] = "\n".join(lines).split("\n")


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", copy_outside)
    app.connect("source-read", link_to_copies)
    app.connect("autodoc-process-docstring", as_markup, priority=900)  # after napoleon
