"""Captures in an object store: written by the process beside the server, read again, and lost where it is not there."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

import pytest

from image_classifier.capture.files import read_captures
from image_classifier.capture.places import open_place
from image_classifier.capture.recorder import Recorder
from image_classifier.capture.writer import Writer
from tests.captures import MESSAGE_BYTES, SERVED, build_message, build_row, draw_answers
from tests.stores import Bucket, cut


def test_what_is_recorded_comes_into_a_bucket(bucket: Bucket) -> None:
    counts: Counter[str] = Counter()
    images = draw_answers(5)

    async def run() -> None:
        recorder = Recorder(
            f"{bucket.url}/captured",
            image_size=32,
            fraction=1.0,
            flush_s=1000.0,
            max_bytes=2**40,
            memory_bytes=2**24,
            count=lambda result, number: counts.update({result: number}),
        )
        await recorder.start()
        recorder.record(SERVED, images, "one", "ann")
        await recorder.stop(30)

    asyncio.run(run())
    assert counts == {"written": 5}
    (captured,) = read_captures(f"{bucket.url}/captured")
    assert captured.request_ids == ["one"] * 5 and captured.callers == ["ann"] * 5
    assert captured.pixels.tobytes() == b"".join(image.pixels or b"" for image in images)


def test_a_store_that_is_gone_loses_files_is_told_of_once_and_used_again(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "image_classifier")
    place = f"{bucket.url}/captured"
    writer = Writer(open_place(place), 2**40, 2.0)
    bucket.proxy.choose_upload = lambda line: cut(0)
    for _ in range(2):
        writer.take(build_message(build_row()))
        assert writer.flush() == ({"failed": 1}, MESSAGE_BYTES)
    assert len(caplog.records) == 1 and "capture failed, answering continues" in caplog.text
    bucket.proxy.choose_upload = lambda line: None
    writer.take(build_message(build_row("kept")))
    assert writer.flush() == ({"written": 1}, MESSAGE_BYTES)
    assert f"capture resumed at {place}" in caplog.text
    assert [captured.request_ids for captured in read_captures(place)] == [["kept"]]
