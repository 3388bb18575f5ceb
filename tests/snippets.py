"""Examples in the documentation, as tests and type checker read them.

    python tests/snippets.py FOLDER      writes every Python example as a module of its own, for mypy

An example is a fenced block. Comments on lines before it: ``<!-- needs: WHAT -->`` where it asks for what is not
there yet, ``<!-- slow -->`` where it takes minutes to run.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "plans" / "README.md"])

_BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>[^\n]*) -->\n)?(?P<slow>^<!-- slow -->\n)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Example:
    """A fenced block: where it stands, what it holds, what it needs that is not there, whether it takes minutes."""

    page: Path
    line: int
    language: str
    text: str
    needs: str | None
    is_slow: bool

    @property
    def name(self) -> str:
        return f"{self.page.stem}:{self.line}"


def examples(language: str) -> Iterator[Example]:
    """Every block of a language ("" for plain ones), page by page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start("text"))
                yield Example(page, line, language, match["text"], match["needs"], bool(match["slow"]))


@dataclass(frozen=True)
class Command:
    """One command line of a page, split into words; comments are gone, continued lines joined."""

    page: Path
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def name(self) -> str:
        return f"{self.page.stem}: {self.text[:60]}"


def commands(program: str) -> Iterator[Command]:
    """Every command line that begins with ``program``, but for synopses such as ``unmergeable COMMAND [OPTIONS]``."""
    for example in examples(""):
        for line in example.text.replace("\\\n", " ").splitlines():
            if line.startswith(f"{program} ") and "[" not in line and "…" not in line:
                yield Command(example.page, line)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.py"):
        stale.unlink()
    for example in examples("python"):
        if example.needs is None:
            name = re.sub(r"\W", "_", f"{example.page.stem}_{example.line}")
            (folder / f"{name}.py").write_text(example.text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
