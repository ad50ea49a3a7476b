"""The repository's files, as Git has them, and the locks of what is installed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import PROJECT, require_program


def list_files() -> list[Path]:
    """List the files that Git tracks or would."""
    words = [require_program("git"), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [PROJECT / name for name in names if name and (PROJECT / name).is_file()]


def read_texts() -> Iterator[tuple[Path, str]]:
    """Read those of them that are text."""
    for path in list_files():
        try:
            yield path.relative_to(PROJECT), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def read_lock(name: str) -> dict[str, str]:
    """Read a lock: version by distribution."""
    text = (PROJECT / "requirements" / f"requirements-{name}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", text, flags=re.MULTILINE))
