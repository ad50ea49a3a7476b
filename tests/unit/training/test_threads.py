"""Threads: as many as the process may use, and results in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from image_classifier.training import threads
from image_classifier.training.threads import Threads, count_cores
from tests.conftest import PROJECT


def test_results_come_in_the_order_of_the_items_whoever_is_first() -> None:
    first_may_end = threading.Event()

    def compute(number: int) -> int:
        if number == 0:
            assert first_may_end.wait(10)
        else:
            first_may_end.set()
        return number**2

    assert list(Threads(2).map(compute, range(5))) == [0, 1, 4, 9, 16]
    assert list(Threads(1).map(lambda number: number + 1, [1, 2])) == [2, 3]
    assert torch.get_num_threads() == 1


def test_an_error_is_raised_when_all_that_had_begun_has_ended() -> None:
    ended = []

    def compute(number: int) -> None:
        if number == 0:
            raise ValueError("first")
        ended.append(number)

    with pytest.raises(ValueError, match="first"):
        list(Threads(2).map(compute, range(100)))
    count = len(ended)
    assert count < 100 or ended == list(range(1, 100))
    assert len(ended) == count


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {"cpu.max": "400000 100000"}, 4),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b", {}, 64),
        (
            "3:cpuset:/x\n2:cpu,cpuacct:/box",
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "300000", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("2:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
    ],
)
def test_the_quota_of_each_group_counts(
    lines: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    (tmp_path / "cgroup").write_text(f"{lines}\n")
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path)
    monkeypatch.setattr(threads, "_MY_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert count_cores() == expected


def test_without_affinity_or_groups_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_MY_CGROUPS", tmp_path / "none")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert count_cores() == os.cpu_count()


def test_more_threads_than_may_be_started_are_refused_with_the_number() -> None:
    script = (
        "from image_classifier.training.threads import *; from tests.confined import limit_memory\n"
        "limit_memory(2**28)\n"
        "try: Threads(1000)\n"
        "except SettingsError as error: print(error)"
    )
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    reason = "this process may start only [0-9]+ threads; choose fewer, or raise the limit .ulimit -u."
    assert re.fullmatch(rf"--num_threads 1000: {reason}\n", answer), answer


def test_processes_of_torchrun_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(threads, "_read_quota", lambda: 7)
    for num_processes, expected in (("1", 7), ("2", 3), ("3", 2), ("9", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", num_processes)
        assert count_cores() == expected
