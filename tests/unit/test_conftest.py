"""What the tests of several workers share: made once, and left to one that must be alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT, make_once

SUITE = """
import time
from pathlib import Path
import pytest
LOG = Path({log!r})
@pytest.mark.alone
@pytest.mark.xdist_group("a")
def test_alone():
    with LOG.open("a") as file:
        file.write("begin alone\\n"); file.flush(); time.sleep(0.3); file.write("end alone\\n")
@pytest.mark.parametrize("number", range(6))
@pytest.mark.xdist_group("b")
def test_other(number):
    time.sleep(0.1)
    with LOG.open("a") as file:
        file.write("other\\n")
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


def test_a_test_that_is_marked_so_runs_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "test_suite.py").write_text(SUITE.format(log=str(log)))
    words = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-n", "2", "--dist", "loadgroup"]
    words += ["--rootdir", str(PROJECT), "--basetemp", str(tmp_path / "base"), str(tmp_path / "test_suite.py")]
    result = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = log.read_text().splitlines()
    assert lines[lines.index("begin alone") + 1] == "end alone" and lines.count("other") == 6
