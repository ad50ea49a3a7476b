"""Commands that are forked are what `python -m` starts: words, environment, folder, outputs, status, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import forked

PROBE = """
import json, os, sys, warnings
had_torch = "torch" in sys.modules
os.environ["ATEN_CPU_CAPABILITY"] = "default"
import torch
warnings.warn("a warning")
facts = [sys.argv[1:], os.getcwd(), os.environ.get("A_VARIABLE"), sys.stdin.read(), sys.path[0], had_torch]
print(json.dumps([*facts, torch.backends.cpu.get_cpu_capability(), torch.__spec__.name, "tests" in sys.modules]))
sys.exit(7)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with modules to run."""
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "sleeping.py").write_text("import time; print('here', flush=True); time.sleep(100)")
    return tmp_path


def test_a_command_has_what_it_was_given_and_its_torch_is_as_good_as_new(folder: Path) -> None:
    result = forked.run("probe", "x", "--y=ä", cwd=folder, variables={"A_VARIABLE": "1"})
    assert result.returncode == 7 and "UserWarning: a warning" in result.stderr
    told = [["x", "--y=ä"], str(folder), "1", "", str(folder), False, "DEFAULT", "torch", False]
    assert json.loads(result.stdout) == told
    strict = forked.run("probe", cwd=folder, strict=True)
    assert (strict.returncode, strict.stdout) == (1, "") and strict.stderr.endswith("UserWarning: a warning\n")


def test_a_command_is_a_process_that_can_be_killed(folder: Path) -> None:
    first, second = (forked.Command("sleeping", cwd=folder) for _ in range(2))
    os.kill(first.pid, signal.SIGKILL)
    assert first.finish().returncode == -signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired):
        second.finish(timeout_s=0.1)
    assert not Path(f"/proc/{second.pid}").exists()


def test_a_variable_that_is_read_at_the_start_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="OMP_NUM_THREADS is read when a process starts"):
        forked.run("probe", cwd=folder, variables={"OMP_NUM_THREADS": "1"})
