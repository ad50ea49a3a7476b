"""How many lines a second are written, whoever writes them."""

from __future__ import annotations

import io
import logging
import re

import pytest

from image_classifier.serving.telemetry import LineLimit, log_request


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Output:
    """What a handler with a limit writes for some loggers."""

    def __init__(self, limit: LineLimit) -> None:
        self._stream = io.StringIO()
        self.handler = logging.StreamHandler(self._stream)
        self.handler.addFilter(limit)

    def log(self, name: str, level: int, text: str, number: int = 1) -> None:
        """Let a logger write some lines."""
        for _ in range(number):
            self.handler.handle(logging.LogRecord(name, level, "", 1, "%s", (text,), None))

    @property
    def lines(self) -> list[str]:
        """The lines up to now."""
        return self._stream.getvalue().splitlines()


def test_lines_of_all_kinds_share_the_limit_and_the_next_one_says_what_is_missing() -> None:
    clock = Clock()
    output = Output(LineLimit(3, clock))
    output.log("uvicorn.error", logging.WARNING, "Invalid HTTP request received.", 100)
    output.log("image_classifier.serving.app", logging.WARNING, "the card is not shown", 100)
    assert output.lines == 3 * ["Invalid HTTP request received."]
    clock.now += 1
    output.log("image_classifier.serving.app", logging.WARNING, "100 % sure", 2)
    assert output.lines[3:] == ["100 % sure (197 lines omitted before)", "100 % sure"]


def test_requests_take_from_the_same_limit() -> None:
    clock = Clock()
    limit = LineLimit(5, clock)
    output = Output(limit)
    output.log("uvicorn.error", logging.WARNING, "Invalid HTTP request received.", 3)
    assert [limit.has_room() for _ in range(4)] == [True, True, False, False]
    output.log("uvicorn.error", logging.WARNING, "Invalid HTTP request received.", 3)
    assert len(output.lines) == 3
    clock.now += 1
    logger = logging.getLogger("image_classifier.serving.request")
    logger.addHandler(output.handler)
    logger.setLevel(logging.INFO)
    try:
        assert limit.has_room()
        log_request("GET", "/a%20b\n", 200, 0.001, {"client.ip": "192.0.2.1"})
    finally:
        logger.removeHandler(output.handler)
        logger.setLevel(logging.NOTSET)
    assert re.fullmatch(r"GET /a%20b\\n 200 1\.0 ms \(5 lines omitted before\)", output.lines[-1])


def test_errors_have_lines_for_themselves() -> None:
    clock = Clock()
    output = Output(LineLimit(2, clock))
    output.log("uvicorn.error", logging.WARNING, "a warning", 100)
    output.log("image_classifier.serving.server", logging.ERROR, "reloading the model failed", 100)
    assert output.lines == [*2 * ["a warning"], "reloading the model failed (98 lines omitted before)"] + [
        "reloading the model failed"
    ]


def test_without_any_lines_the_first_error_is_written() -> None:
    output = Output(LineLimit(0, Clock()))
    output.log("image_classifier.serving.app", logging.WARNING, "a warning", 3)
    output.log("image_classifier.serving.app", logging.ERROR, "an error", 3)
    assert output.lines == ["an error (3 lines omitted before)"]


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("uvicorn.error", logging.INFO),
        ("image_classifier.serving.server", logging.INFO),
        ("image_classifier.serving.server", logging.CRITICAL),
    ],
)
def test_start_and_end_are_always_written(name: str, level: int) -> None:
    output = Output(LineLimit(0, Clock()))
    output.log(name, level, "the end", 3)
    assert output.lines == 3 * ["the end"]


def test_a_record_says_as_a_field_how_many_are_missing() -> None:
    clock = Clock()
    limit = LineLimit(1, clock)
    records = [logging.LogRecord("uvicorn.error", logging.WARNING, "", 1, "text", (), None) for _ in range(3)]
    assert [limit.filter(record) for record in records] == [True, False, False]
    clock.now += 1
    assert limit.filter(records[0])
    assert vars(records[0])["labels.lines_left_out"] == 2
