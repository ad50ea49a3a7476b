"""Progress: silent in the library, lines in a log, bars on a terminal, and nothing that costs the work anything."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr

import pytest

from image_classifier import progress
from image_classifier.progress import Task, paused, say, shown, track


class Terminal(io.StringIO):
    """A stream that passes for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A log, to which a line is due every hundredth of a second."""
    monkeypatch.setattr(progress, "INTERVAL_S", 0.01)
    return io.StringIO()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal, on which work is shown after a hundredth of a second."""
    monkeypatch.setattr(progress, "DELAY_S", 0.01)
    return Terminal()


@contextmanager
def shown_on(stream: io.StringIO) -> Iterator[None]:
    """Show progress on a stream that stands for stderr."""
    with redirect_stderr(stream), shown("command"):
        yield


def wait_for(is_so: Callable[[], bool]) -> None:
    for _ in range(6000):
        if is_so():
            return
        time.sleep(0.01)
    pytest.fail("it did not come to that in a minute")


def test_without_a_command_nothing_is_shown(log: io.StringIO) -> None:
    with redirect_stderr(log):
        with track("working", 3, "images") as task:
            task.advance(2)
            time.sleep(0.1)
        assert (task.done, log.getvalue()) == (2, "")
        say("a line")
    assert log.getvalue() == "a line\n"


def test_a_log_gets_a_line_whenever_one_is_due_with_all_that_goes_on(log: io.StringIO) -> None:
    with shown_on(log):
        wait_for(lambda: "command: 0 s\n" in log.getvalue())
        with track("reading", unit="images") as outer:
            outer.advance(1200)
            with track("evaluating", 2000, "images") as inner:
                inner.advance(500)
                inner.detail = "loss=1"
                words = "reading: 1,200 images, 0 s; evaluating: 500 of 2,000 images (25%), 0 s, loss=1\n"
                wait_for(lambda: words in log.getvalue())
            with track("drawing"):
                wait_for(lambda: "reading: 1,200 images, 0 s; drawing: 0 s\n" in log.getvalue())
    ended = log.getvalue()
    time.sleep(0.05)
    assert log.getvalue() == ended and "\r" not in ended


def test_a_line_of_the_work_itself_counts_as_one(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", 0.5)
    with shown_on(log):
        for number in range(20):
            say(f"line {number}")
            time.sleep(0.05)
    assert [line for line in log.getvalue().splitlines() if not line.startswith("line ")] == []


def test_by_default_a_line_is_due_every_30_seconds_and_a_terminal_shows_what_takes_2() -> None:
    assert (progress.INTERVAL_S, progress.DELAY_S) == (30, 2)


def test_a_terminal_shows_a_bar_for_what_is_counted_and_the_time_for_what_is_not(terminal: Terminal) -> None:
    with shown_on(terminal):
        with track("reading", 2000, "images") as task:
            task.advance(500)
            wait_for(lambda: re.search(r"reading: +25%\|.*500/2\.00k", terminal.getvalue()) is not None)
        with track("drawing"):
            wait_for(lambda: "drawing: 00:00" in terminal.getvalue())
        with track("downloading", unit="bytes") as task:
            task.advance(7)
            wait_for(lambda: "downloading: 7.00 bytes" in terminal.getvalue())
            task.total = 14
            wait_for(lambda: re.search(r"downloading: +50%\|", terminal.getvalue()) is not None)
    assert terminal.getvalue().endswith("\r")  # the line is free again


def test_a_terminal_shows_nothing_of_what_is_over_soon_unless_it_stays(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", 60)
    with shown_on(terminal):
        with track("reading", 10, "images"):
            time.sleep(0.3)
        assert terminal.getvalue() == ""
        with track("training", 10, "images", stays=True) as task:
            task.advance(10)
    assert re.search(r"training: 100%\|.*10\.0/10\.0 .*\n$", terminal.getvalue())


def test_a_line_stands_above_the_bars(terminal: Terminal) -> None:
    with shown_on(terminal), track("training", 10, "images", stays=True):
        wait_for(lambda: "training" in terminal.getvalue())
        say("epoch 1")
        assert re.search(r"\repoch 1\n", terminal.getvalue())


def test_who_is_asked_for_something_has_the_terminal_alone(terminal: Terminal) -> None:
    with shown_on(terminal), track("reading", 10, "images") as task:
        wait_for(lambda: "reading" in terminal.getvalue())
        with paused():
            before = terminal.getvalue()
            task.advance(5)
            time.sleep(0.3)
            assert terminal.getvalue() == before
        wait_for(lambda: "50%" in terminal.getvalue())


def test_a_stream_that_nobody_reads_any_more_ends_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(progress, "INTERVAL_S", 0.001)
    with shown_on(Broken()), track("working") as task:
        time.sleep(0.05)
        task.advance()
    monkeypatch.setattr(sys, "stderr", None)
    with shown("command"), track("working"):
        pass


def test_a_task_of_unknown_length_says_how_much_is_done() -> None:
    assert Task("reading", unit="images", done=3).format() == "reading: 3 images, 0 s"
    assert Task("training", 0, "images").format() == "training: 0 images, 0 s"


def test_a_tracked_function_keeps_its_name_and_its_tasks_apart(log: io.StringIO) -> None:
    @track("counting down")
    def count_down(number: int) -> int:
        """Count down."""
        time.sleep(0.05)
        return count_down(number - 1) if number else 0

    assert (count_down.__name__, count_down.__doc__, count_down(0)) == ("count_down", "Count down.", 0)
    with shown_on(log):
        assert count_down(2) == 0
        wait_for(lambda: "command: 0 s\n" in log.getvalue())
    assert "counting down: 0 s; counting down: 0 s; counting down: 0 s\n" in log.getvalue()
