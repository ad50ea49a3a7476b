"""What a server answers is written; what cannot be is counted, and said once."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from image_classifier.capture.files import read_captures
from image_classifier.capture.places import LocalPlace, Place
from image_classifier.capture.recorder import CHUNK, Recorder
from image_classifier.published.predictor import PublishedModel

MODEL = PublishedModel(Path("model.onnx"), ("a", "b"), "1", "e", "r", "0" * 64, "one", 1, digest="d" * 64)


@dataclass
class Image:
    pixels: bytes | None
    row: list[float]
    batch_size: int = 1


def draw(number: int, seed: int = 0) -> list[Image]:
    generator = np.random.default_rng(seed)
    pixels = [generator.integers(0, 256, 3072, np.uint8).tobytes() for _ in range(number)]
    return [Image(each, generator.random(2, np.float32).tolist(), row + 1) for row, each in enumerate(pixels)]


class Counts(Counter[str]):
    def __call__(self, result: str, number: int) -> None:
        self[result] += number


def build(place: Place | Path, **options: Any) -> tuple[Recorder, Counts]:
    """Build a recorder and start it; it flushes at the end alone."""
    counts = Counts()
    given = {"image_size": 32, "fraction": 1.0, "flush_s": 1000.0, "max_bytes": 2**40, "memory_bytes": 2**24} | options
    recorder = Recorder(LocalPlace(place) if isinstance(place, Path) else place, count=counts, **given)
    recorder.start()
    return recorder, counts


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_that_is_recorded_is_written_at_the_end(tmp_path: Path) -> None:
    recorder, counts = build(tmp_path)
    images = draw(2 * CHUNK + 5)
    recorder.record(MODEL, images[:3], "first", "")
    for number, image in enumerate(images[3:], 3):
        recorder.record(MODEL, [image], f"request-{number}", "ann")
    recorder.stop(20)
    captured = list(read_captures(tmp_path))
    assert sum(map(len, captured)) == len(images) and counts == {"written": len(images)}
    assert np.concatenate([each.pixels for each in captured]).tobytes() == b"".join(
        each.pixels or b"" for each in images
    )
    assert np.concatenate([each.probabilities for each in captured]).tolist() == [each.row for each in images]
    first = captured[0]
    assert first.request_ids[:4] == ["first"] * 3 + ["request-3"]
    assert first.image_indices[:4].tolist() == [0, 1, 2, 0] and first.callers[:4] == [None] * 3 + ["ann"]
    assert first.facts.model_digest == MODEL.digest and "ONNX Runtime" in first.facts.machine


def test_a_fraction_of_the_requests_is_written_with_all_their_images(tmp_path: Path) -> None:
    recorder, counts = build(tmp_path, fraction=0.3)
    image = draw(1)[0]
    for number in range(1000):
        recorder.record(MODEL, [image, image], str(number), "")
    recorder.stop(20)
    assert 400 < counts["written"] < 800
    assert all(each.request_ids.count(name) == 2 for each in read_captures(tmp_path) for name in each.request_ids[:20])


def test_files_are_written_when_it_is_time_and_when_there_are_enough(tmp_path: Path) -> None:
    recorder, counts = build(tmp_path, flush_s=0.2)
    recorder.record(MODEL, draw(1), "early", "")
    wait_until(lambda: counts["written"] == 1)
    recorder.stop(20)
    recorder, counts = build(tmp_path, memory_bytes=100 * 4096)  # of which a quarter is a file
    recorder.record(MODEL, draw(30), "many", "")
    wait_until(lambda: counts["written"] >= 25)
    recorder.stop(20)
    assert counts["written"] == 30


def test_files_hold_one_model_and_one_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(MODEL, version="2", digest="e" * 64, classes=("a", "b", "c"))
    recorder, counts = build(tmp_path)
    for now_s in (3599.9, 3600.1):
        monkeypatch.setattr(time, "time_ns", lambda now_s=now_s: int(now_s * 1e9))
        for number in range(4):
            image = draw(1)[0]
            is_other = number % 2
            image.row += [0.5] * is_other
            recorder.record(other if is_other else MODEL, [image], f"{now_s}-{number}", "")
    recorder.stop(20)
    captured = list(read_captures(tmp_path))
    assert [each.path[:23] for each in captured] == ["date=1970-01-01/hour=00"] * 2 + ["date=1970-01-01/hour=01"] * 2
    assert {tuple(each.model_versions) for each in captured} == {("1", "1"), ("2", "2")}
    assert {len(each.facts.classes) for each in captured} == {2, 3}


class Stuck(LocalPlace):
    """A place that does not answer until it is let."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = threading.Event()
        self.entered = threading.Event()

    def write(self, path: str, content: bytes | memoryview) -> None:
        self.entered.set()
        assert self.gate.wait(20)
        super().write(path, content)


def test_a_slow_place_delays_nothing_and_what_it_cannot_take_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Stuck(tmp_path)
    recorder, counts = build(place, flush_s=0.01, memory_bytes=20 * 4096)
    images = draw(15)
    recorder.record(MODEL, images[:1], "first", "")
    assert place.entered.wait(20)
    began = time.perf_counter()
    for number in range(1000):
        recorder.record(MODEL, images, str(number), "")
    assert time.perf_counter() - began < 1
    assert counts == {"dropped": 999 * 15}
    assert [record.levelname for record in caplog.records] == ["ERROR"] and "slower than they come" in caplog.text
    place.gate.set()
    recorder.stop(20)
    assert counts == {"dropped": 999 * 15, "written": 16}


def test_a_place_that_hangs_does_not_hold_up_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = Stuck(tmp_path)
    recorder, counts = build(place)
    recorder.record(MODEL, draw(3), "lost", "")
    began = time.monotonic()
    recorder.stop(0.1)
    assert time.monotonic() - began < 2 and counts == {"failed": 3}
    assert "3 captured images are lost" in caplog.text
    place.gate.set()
    recorder.stop(20)


def test_a_place_that_goes_away_and_comes_back_is_told_of_once_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "image_classifier")
    folder = tmp_path / "captured"
    folder.write_bytes(b"")  # no folder
    recorder, counts = build(folder, flush_s=0.01)
    for number in (1, 2, 3):
        recorder.record(MODEL, draw(1), str(number), "")
        wait_until(lambda number=number: counts["failed"] == number)  # type: ignore[misc]
    assert len(caplog.records) == 1 and "cannot be captured, and are given all the same" in caplog.text
    folder.unlink()
    recorder.record(MODEL, draw(1), "4", "")
    wait_until(lambda: counts["written"] == 1)
    assert len(caplog.records) == 2 and "captured again" in caplog.text
    recorder.stop(20)
    assert [each.request_ids for each in read_captures(folder)] == [["4"]]


def test_what_cannot_be_a_row_is_lost_alone(tmp_path: Path) -> None:
    recorder, counts = build(tmp_path)
    recorder.record(MODEL, draw(1), "no text: \ud800", "")
    recorder.stop(20)
    assert counts == {"failed": 1}


def test_a_full_place_takes_no_more_until_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("image_classifier.capture.recorder.MEASURE_FULL_S", 0.0)
    recorder, counts = build(tmp_path, flush_s=0.01, max_bytes=15_000)
    for number, result in enumerate(("written", "dropped", "dropped")):
        recorder.record(MODEL, draw(3), str(number), "")
        wait_until(lambda result=result, number=number: counts[result] == 3 * max(1, number))  # type: ignore[misc]
    assert len(caplog.records) == 1 and "has its 15000 bytes; make room" in caplog.text
    (file,) = tmp_path.rglob("*.parquet")
    assert file.stat().st_size < 15_000
    file.unlink()
    recorder.record(MODEL, draw(3), "3", "")
    wait_until(lambda: counts["written"] == 6)
    recorder.stop(20)
