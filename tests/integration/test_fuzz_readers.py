"""Every reader on files that were changed at random; `python -m benchmarks.fuzz_readers` does the same at length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROJECT
from tests.fuzz import Reader, build_file

NUM_FILES = 4000
GOING_ON = ("checkpoint", "job summary", "snapshot")
"""Readers that go on without what is damaged, or make it again, and refuse hardly a file."""


def fuzz(folder: Path, *words: str | int) -> dict[str, Any]:
    """Run the benchmark's script and return its result."""
    output = folder / "result.json"
    command = [sys.executable, "-m", "benchmarks.fuzz_readers", *map(str, words), "--output", str(output)]
    result = subprocess.run(
        [*command, "--findings", str(folder / "findings")], cwd=PROJECT, capture_output=True, text=True, timeout=280
    )
    assert output.exists(), result.stderr
    read: dict[str, Any] = json.loads(output.read_text()) | {"status": result.returncode}
    return read


def test_every_reader_takes_or_refuses_what_is_damaged(tmp_path: Path) -> None:
    result = fuzz(tmp_path, "--files", NUM_FILES, "--real", 20)
    assert result["findings"] == [], [path.read_text() for path in (tmp_path / "findings").glob("*.json")]
    assert result["status"] == 0 and result["num_files"] >= NUM_FILES and result["num_real"] == 20
    for name, counts in result["readers"].items():
        assert counts["read"], name  # else the files are changed beyond what gets to the reader's inside
        assert counts["refused"] or name in GOING_ON, name


def test_what_no_reader_may_do_is_found(tmp_path: Path) -> None:
    result = fuzz(tmp_path, "--files", 14, "--real", 0, "--readers", "tests.bad_readers:build_readers")
    kinds = {(finding["reader"].split()[0], finding["kind"]) for finding in result["findings"]}
    assert kinds == {(kind, kind) for kind in ("exception", "message", "time", "crash", "memory")}
    assert result["status"] == 1 and len(result["findings"]) == 12
    assert result["readers"]["refused"] == {**result["readers"]["refused"], "files": 2, "refused": 2}
    kept = {path.suffix for path in (tmp_path / "findings").iterdir()}
    assert kept == {".file", ".json"} and len(list((tmp_path / "findings").iterdir())) == 24


@pytest.mark.parametrize("number", [0, 1])
def test_a_file_follows_from_the_reader_and_two_numbers(number: int) -> None:
    def change(chance: Any, content: bytes) -> bytes:
        return content + bytes(chance.randbytes(8))

    reader = Reader("name", {"a": b"a", "b": b"b"}, change, lambda name, content, folder: None)
    assert build_file(reader, 0, number) == build_file(reader, 0, number)
    assert build_file(reader, 0, number) != build_file(reader, 1, number)
