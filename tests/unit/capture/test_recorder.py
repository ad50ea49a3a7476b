"""What a server answers is written by another process; what cannot be is counted, said once, and delays nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from image_classifier.capture import recorder as module
from image_classifier.capture import writer
from image_classifier.capture.files import read_captures
from image_classifier.capture.recorder import CHUNK, Recorder
from tests.captures import SERVED, draw_answers


class Counts(Counter[str]):
    def __call__(self, result: str, number: int) -> None:
        self[result] += number


Use = Callable[[Recorder, Counts], Awaitable[None]]


def record(place: Path, use: Use, *, within_s: float = 20, **options: Any) -> Counts:
    """Use a recorder on an event loop, and stop it; it flushes at the end alone."""
    counts = Counts()
    given = {"image_size": 32, "fraction": 1.0, "flush_s": 1000.0, "max_bytes": 2**40, "memory_bytes": 2**24} | options

    async def run() -> None:
        recorder = Recorder(str(place), count=counts, **given)
        await recorder.start()
        try:
            await use(recorder, counts)
        finally:
            await recorder.stop(within_s)

    asyncio.run(run())
    return counts


async def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def find_writer() -> int:
    """Find the writer process among the children of this process, some of which belong to other tests."""
    while True:  # right after exec, the kernel shows an empty command line
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        lines = {int(each): Path(f"/proc/{each}/cmdline").read_bytes() for each in children}
        for each, line in lines.items():
            if writer.__name__.encode() in line.split(b"\0"):
                return each


def test_all_that_is_recorded_is_written_at_the_end(tmp_path: Path) -> None:
    images = draw_answers(2 * CHUNK + 5)

    async def use(recorder: Recorder, counts: Counts) -> None:
        recorder.record(SERVED, images[:3], "first", "")
        for number, image in enumerate(images[3:], 3):
            recorder.record(SERVED, [image], f"request-{number}", "ann")
        recorder.record(replace(SERVED, version="2", digest="e" * 64), images[:2], "other", "")

    assert record(tmp_path, use) == {"written": len(images) + 2}
    captured, other = read_captures(tmp_path)
    assert captured.pixels.tobytes() == b"".join(each.pixels or b"" for each in images)
    assert captured.probabilities.tolist() == [each.row for each in images]
    assert captured.request_ids[:4] == ["first"] * 3 + ["request-3"]
    assert captured.image_indices[:4].tolist() == [0, 1, 2, 0]
    assert captured.callers[:4] == [None] * 3 + ["ann"]
    assert captured.facts.model_digest == SERVED.digest and "ONNX Runtime" in captured.facts.machine
    assert other.request_ids == ["other"] * 2 and other.model_versions == ["2"] * 2


def test_a_fraction_of_the_requests_is_written_with_all_their_images(tmp_path: Path) -> None:
    image = draw_answers(1)[0]

    async def use(recorder: Recorder, counts: Counts) -> None:
        for number in range(1000):
            recorder.record(SERVED, [image, image], str(number), "")

    assert 400 < record(tmp_path, use, fraction=0.3)["written"] < 800
    assert all(each.request_ids.count(name) == 2 for each in read_captures(tmp_path) for name in each.request_ids[:20])


def test_files_are_written_when_it_is_time_and_when_there_are_enough(tmp_path: Path) -> None:
    async def use(recorder: Recorder, counts: Counts) -> None:
        recorder.record(SERVED, draw_answers(1), "early", "")
        await wait_until(lambda: counts["written"] == 1)

    record(tmp_path, use, flush_s=0.2)

    async def use_many(recorder: Recorder, counts: Counts) -> None:
        recorder.record(SERVED, draw_answers(30), "many", "")
        await wait_until(lambda: counts["written"] == 30)

    record(tmp_path, use_many, memory_bytes=100 * 4096)  # of which a quarter is a file


def test_a_writer_that_hangs_delays_nothing_and_is_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = draw_answers(15)

    async def use(recorder: Recorder, counts: Counts) -> None:
        os.kill(find_writer(), signal.SIGSTOP)
        began = time.perf_counter()
        for number in range(1000):
            recorder.record(SERVED, images, str(number), "")
        assert time.perf_counter() - began < 1
        assert counts["dropped"] > 900 * 15
        assert [each.levelname for each in caplog.records] == ["ERROR"] and "is too slow" in caplog.text

    began = time.monotonic()
    counts = record(tmp_path, use, within_s=0.1, memory_bytes=100 * 4096)
    assert time.monotonic() - began < 5
    assert counts["failed"] > 0 and counts.total() == 1000 * 15 and counts["written"] == 0
    assert f"{counts['failed']} captured images are lost" in caplog.text


def test_a_writer_that_dies_is_counted_and_told_of_once_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESTART_S", 0.01)

    async def use(recorder: Recorder, counts: Counts) -> None:
        for number in (1, 2):
            await wait_until(lambda: recorder.is_writing)
            recorder.record(SERVED, draw_answers(CHUNK), f"lost-{number}", "")
            os.kill(find_writer(), signal.SIGKILL)
            await wait_until(lambda number=number: counts["failed"] == number * CHUNK)  # type: ignore[misc]
        assert [each.getMessage() for each in caplog.records] == [
            f"{CHUNK} captured images are lost: the writer process ended with status -9 and is restarted"
        ]
        await wait_until(lambda: recorder.is_writing)
        recorder.record(SERVED, draw_answers(CHUNK), "kept", "")

    assert record(tmp_path, use) == {"failed": 2 * CHUNK, "written": CHUNK}


def test_a_writer_that_cannot_be_started_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESTART_S", 0.01)
    start, num_tries = subprocess.Popen, 0

    def fail_twice(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        nonlocal num_tries
        num_tries += 1
        if num_tries < 3:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", fail_twice)

    async def use(recorder: Recorder, counts: Counts) -> None:
        recorder.record(SERVED, draw_answers(CHUNK), "lost", "")
        assert counts == {"failed": CHUNK}
        await wait_until(lambda: recorder.is_writing)
        recorder.record(SERVED, draw_answers(2), "kept", "")

    assert record(tmp_path, use) == {"failed": CHUNK, "written": 2}
    assert caplog.text.count("Resource temporarily unavailable") == 1


def test_the_writer_writes_what_is_left_when_the_server_is_killed(tmp_path: Path) -> None:
    code = """
import asyncio, os, signal, sys
from image_classifier.capture.recorder import Recorder
from tests.captures import SERVED, draw_answers
async def run():
    given = {"image_size": 32, "fraction": 1.0, "flush_s": 1000.0, "max_bytes": 2**40, "memory_bytes": 2**24}
    recorder = Recorder(sys.argv[1], count=print, **given)
    await recorder.start()
    recorder.record(SERVED, draw_answers(3), "left", "")
    await asyncio.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(run())
"""
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while not any(tmp_path.glob("date=*/hour=*/*.parquet")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (captured,) = read_captures(tmp_path)
    assert captured.request_ids == ["left"] * 3
