"""The documents that users read, and their blocks of code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import PROJECT

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "data/*.md", "docs/**/*.md", "examples/*/*.md", "experiments/*.md", "benchmarks/*.md")
    for path in PROJECT.glob(pattern)
)
EXECUTED = [PROJECT / name for name in ("README.md", "docs/getting_started.md", "docs/own_images.md")]
"""Documents whose commands a user types one after the other: tests/e2e/test_readme.py does so."""

DATA = {"text", "json", "yaml"}
"""Languages of blocks that hold no code."""

_BLOCK = re.compile(r"(?:^<!-- ([^\n]+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code, and what the comment before it says: that it is executed elsewhere, or why it is not."""

    document: Path
    language: str
    code: str
    comment: str

    def __str__(self) -> str:
        return f"{self.document.name}: {self.code.partition(chr(10))[0][:40]}"


def iterate_blocks(document: Path) -> Iterator[Block]:
    """Iterate over a document's blocks of code."""
    for comment, language, code in _BLOCK.findall(document.read_text(encoding="utf-8")):
        yield Block(document, language, code, comment if "executed" in comment else "")


def get_section(document: str, title: str) -> str:
    """Get the text of one section of a document, which is named within the project."""
    text = (PROJECT / document).read_text(encoding="utf-8")
    sections = re.split(r"^##+ ", text, flags=re.MULTILINE)
    (section,) = (section for section in sections if section.partition("\n")[0] == title)
    return section


def list_run_files() -> list[str]:
    """List the files of a run folder that the documentation names."""
    return re.findall(r"^\| `([^`]+)`", get_section("docs/formats.md", "The run folder"), flags=re.MULTILINE)
