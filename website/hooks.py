"""The hook of `mkdocs.yml`: fills the reference pages, and adds what the pages link to outside of docs/.

A link to another file of the repository gets a copy of that file in the site, below `project/`. A document there is a
page like the others. The README is the site's first page.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
README = PROJECT / "README.md"
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "data/README.md")
"""Documents outside of docs/ that mkdocs.yml names in its navigation."""

_LINK = re.compile(r"(\]\()([^)\s]+)(\))|(<(?:img|a) [^>]*?(?:src|href)=\")([^\"]+)(\")")
GENERATED = re.compile(r"^<!-- generated: (\w+) -->$.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
"""What the build of the site fills; until then, the text inside says where the filled page is."""
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def get_uri(path: Path) -> str:
    """Get the place that a file of the repository has in the site."""
    if path == README:
        return "index.md"
    name = path.relative_to(PROJECT)
    return name.relative_to("docs").as_posix() if name.parts[0] == "docs" else f"project/{name.as_posix()}"


def find_target(link: str, document: Path) -> Path | None:
    """Find the file of the repository that a link of a document leads to; None for addresses and places of a page."""
    if "://" in link or link.startswith(("#", "mailto:")):
        return None
    target = Path(os.path.normpath(document.parent / link.partition("#")[0]))
    return target / "README.md" if target.is_dir() else target


def find_links(text: str) -> list[str]:
    """Find the links of a document, those in blocks of code left out."""
    return [match[2] or match[5] for match in _LINK.finditer(_FENCE.sub("", text))]


def find_copies(documents: list[Path]) -> set[Path]:
    """Find what documents link to outside of docs/, and what those documents link to in turn."""
    found = {README, *(PROJECT / name for name in PAGES)}
    pending = [*documents, *found]
    while pending:
        document = pending.pop()
        for link in find_links(document.read_text(encoding="utf-8")):
            target = find_target(link, document)
            if target is None or target in found or target.is_relative_to(PROJECT / "docs"):
                continue
            if not target.is_file():
                raise SystemExit(f"{document.relative_to(PROJECT)} links to {link}, which is not there")
            found.add(target)
            pending += [target] if target.suffix == ".md" else []
    return found


def rewrite_links(text: str, document: Path) -> str:
    """Rewrite a document's links to files of the repository into links of the site."""
    folder = posixpath.dirname(get_uri(document)) or "."

    def rewrite(match: re.Match[str]) -> str:
        before, link, after = (match[1], match[2], match[3]) if match[2] else (match[4], match[5], match[6])
        target = find_target(link, document)
        if target is None:
            return match[0]
        _, hash_sign, anchor = link.partition("#")
        return f"{before}{posixpath.relpath(get_uri(target), folder)}{hash_sign}{anchor}{after}"

    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(rewrite, part) for part in parts)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the copies."""
    from mkdocs.structure.files import File

    documents = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    for path in sorted(find_copies(documents)):
        files.append(File.generated(config, get_uri(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the generated parts between their marks, and rewrite the links of what is a file of the repository."""
    from website.reference import build_parts

    parts = build_parts()
    markdown = GENERATED.sub(lambda match: parts[match[1]](), markdown)
    path = page.file.abs_src_path
    return rewrite_links(markdown, Path(path)) if path and Path(path).is_relative_to(PROJECT) else markdown
