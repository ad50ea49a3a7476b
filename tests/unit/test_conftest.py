"""What the tests of several workers share: made once, and left to one that must be alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT, make_once

HEAD = """
import os, time
import pytest
def log(words):
    with open({log!r}, "a") as file:
        file.write(words + "\\n")
"""
ALONE = """
@pytest.mark.alone
def test_alone():
    log("begin alone")
    time.sleep(0.3)
    log("end alone")
"""
OTHER = """
@pytest.mark.parametrize("number", range(6))
def test_other(number):
    time.sleep(0.1)
    log("other in " + os.environ["PYTEST_XDIST_WORKER"])
"""


def test_a_folder_is_made_once_and_again_after_a_failure(tmp_path: Path) -> None:
    calls: list[Path] = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "part").touch(exist_ok=False)
        if len(calls) == 1:
            raise ValueError

    with pytest.raises(ValueError):
        make_once(tmp_path / "folder", make)
    for _ in range(2):
        assert [path.name for path in make_once(tmp_path / "folder", make).iterdir()] == ["part"]
    assert len(calls) == 2


def test_a_test_that_is_marked_so_runs_alone_and_those_of_a_file_in_one_worker(tmp_path: Path) -> None:
    log = tmp_path / "log"
    files = [tmp_path / f"test_{name}.py" for name in ("a", "b")]
    for file, suite in zip(files, (ALONE, OTHER), strict=True):
        file.write_text(HEAD.format(log=str(log)) + suite)
    options = re.findall(r"--dist \w+|--no-loadscope-reorder", (PROJECT / "Makefile").read_text())
    words = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-n", "2", *" ".join(options).split()]
    words += ["--rootdir", str(PROJECT), "--basetemp", str(tmp_path / "base"), *map(str, files)]
    result = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = log.read_text().splitlines()
    assert lines[lines.index("begin alone") + 1] == "end alone"
    others = [line for line in lines if line.startswith("other in ")]
    assert len(others) == 6 and len(set(others)) == 1
