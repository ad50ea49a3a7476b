"""What the process beside the server makes of messages: files, counts, and words about what is wrong, said once."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest

from image_classifier.capture.files import CaptureFacts, read_captures
from image_classifier.capture.places import LocalPlace
from image_classifier.capture.writer import HOUR_US, Writer
from tests.captures import MESSAGE_BYTES, MESSAGE_FACTS, build_message, build_row

OTHER = CaptureFacts(32, ("a", "b", "c"), "e" * 64, "a machine")


def test_files_hold_one_model_and_one_hour(tmp_path: Path) -> None:
    writer = Writer(LocalPlace(tmp_path), 2**40, 2.0)
    for facts in (MESSAGE_FACTS, OTHER):
        chances = (0.5,) * len(facts.classes)
        rows = [build_row(str(time_us), time_us, chances) for time_us in (HOUR_US - 2, HOUR_US - 1, HOUR_US)]
        writer.take(build_message(*rows, facts=facts))
    assert writer.num_images == 6
    assert writer.flush() == ({"written": 6}, 2 * MESSAGE_BYTES)
    assert writer.num_images == 0 and writer.flush() == ({}, 0)
    captured = list(read_captures(tmp_path))
    assert [each.path[:23] for each in captured] == ["date=1970-01-01/hour=00"] * 2 + ["date=1970-01-01/hour=01"] * 2
    assert [len(each) for each in captured] == [2, 2, 1, 1]
    assert {each.facts for each in captured} == {MESSAGE_FACTS, OTHER}
    pixels = np.random.default_rng(0).bytes(3 * 3072)
    assert captured[0].pixels.tobytes() + captured[2].pixels.tobytes() == pixels


def test_what_cannot_be_a_row_is_lost_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Writer(LocalPlace(tmp_path), 2**40, 2.0)
    names = ["0", "1", "no text: \ud800", "3", "4"]
    writer.take(build_message(*map(build_row, names)))
    writer.take(build_message(build_row(), missing=1))
    assert writer.flush() == ({"written": 4, "failed": 2}, 2 * MESSAGE_BYTES)
    (captured,) = read_captures(tmp_path)
    assert captured.request_ids == ["0", "1", "3", "4"]
    pixels = np.random.default_rng(0).bytes(5 * 3072)
    assert captured.pixels.tobytes() == pixels[: 2 * 3072] + pixels[3 * 3072 :]
    assert caplog.text.count("capture failed, answering continues") == 1


def test_a_place_that_goes_away_and_comes_back_is_told_of_once_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "image_classifier")
    folder = tmp_path / "captured"
    folder.write_bytes(b"")  # no folder
    writer = Writer(LocalPlace(folder), 2**40, 2.0)
    for _ in range(3):
        writer.take(build_message(build_row()))
        assert writer.flush() == ({"failed": 1}, MESSAGE_BYTES)
    assert len(caplog.records) == 1 and "capture failed, answering continues" in caplog.text
    folder.unlink()
    writer.take(build_message(build_row("4")))
    assert writer.flush() == ({"written": 1}, MESSAGE_BYTES)
    assert len(caplog.records) == 2 and "capture resumed" in caplog.text
    assert [each.request_ids for each in read_captures(folder)] == [["4"]]


def test_a_full_place_takes_no_more_until_there_is_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Writer(LocalPlace(tmp_path), 15_000, 2.0)
    rows = [build_row(str(number)) for number in range(3)]
    for result in ("written", "dropped", "dropped"):
        writer.take(build_message(*rows))
        assert writer.flush() == ({result: 3}, MESSAGE_BYTES)
    assert len(caplog.records) == 1 and "has reached its limit of 15000 bytes; make room" in caplog.text
    (file,) = tmp_path.rglob("*.parquet")
    assert file.stat().st_size < 15_000
    file.unlink()
    writer.take(build_message(*rows))
    assert writer.flush()[0] == {"dropped": 3}  # as it is not measured every time


@pytest.mark.parametrize(("age_s", "is_patient"), [(1.0, True), (1.6, False)])
def test_others_go_first_while_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age_s: float, is_patient: bool
) -> None:
    yields: list[None] = []
    monkeypatch.setattr(os, "sched_yield", lambda: yields.append(None))
    writer = Writer(LocalPlace(tmp_path), 2**40, 2.0)
    time_us = time.time_ns() // 1000 - round(age_s * 1e6)
    for _ in range(10):
        writer.take(build_message(*[build_row(str(number), time_us) for number in range(64)]))
    assert writer.flush()[0] == {"written": 640}
    assert len(yields) > 20 if is_patient else not yields


def test_a_full_place_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").write_bytes(bytes(20_000))
    writer = Writer(LocalPlace(tmp_path), 15_000, 2.0)
    (tmp_path / "large").unlink()
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    writer.take(build_message(build_row()))
    assert writer.flush()[0] == {"written": 1}
