"""The trials of a sweep at the terminal: a table that is drawn anew, or a line a trial where there is no terminal."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from image_classifier.cli.signals import StopRequest
from image_classifier.cli.table import format_percentage, format_table
from image_classifier.errors import Interrupted
from image_classifier.progress import Task, paused, say, track
from image_classifier.reporter import Reporter, Reporters
from image_classifier.settings import RunSettings
from image_classifier.studies.sweep import Row, Watcher
from image_classifier.text import make_printable
from image_classifier.training.loop import Step

_LINES_AROUND = 6
"""Of a terminal, that the table leaves for what is below it."""


class TrialsShown(Watcher):
    """Shows trials on stderr."""

    def __init__(self, num_trials: int) -> None:
        self._num_trials = num_trials
        self._is_terminal = sys.stderr.isatty()
        self._num_told: int | None = None
        self._shown = ""
        self._lock = threading.Lock()

    def show(self, rows: Sequence[Row]) -> None:
        with self._lock:  # the thread that gives signs of life shows trials, too
            self._show(rows)

    def _show(self, rows: Sequence[Row]) -> None:
        if self._is_terminal:
            self._draw(format_trials(rows, self._num_trials))
            return
        told = [row for row in rows if row.state not in ("running", "waiting")]
        if self._num_told is None:
            self._num_told = len(told)
            if told:
                say(f"goes on after {len(told)} of {self._num_trials} trials")
        for row in told[self._num_told :]:
            say(make_printable(format_line(row, find_best(told[: row.number + 1]), self._num_trials)))
        self._num_told = max(self._num_told, len(told))

    def _draw(self, table: str) -> None:
        """Draw the table over the one before."""
        size = shutil.get_terminal_size()
        lines = table.splitlines()
        most = max(3, size.lines - _LINES_AROUND)
        if len(lines) > most:
            lines = [*lines[:2], *lines[len(lines) - most + 2 :]]
        text = "\n".join(line[: size.columns - 1] for line in lines) + "\n"
        if text == self._shown:
            return
        height = self._shown.count("\n")
        with paused():
            sys.stderr.write((f"\x1b[{height}A\x1b[J" if height else "") + text)
            sys.stderr.flush()
        self._shown = text

    def note(self, text: str) -> None:
        """Write a line that stays."""
        say(text)
        self._shown = ""  # the next table comes below


def find_best(rows: Sequence[Row]) -> Row | None:
    """Find the best of the trials that came to their end."""
    complete = [row for row in rows if row.state == "complete" and row.value is not None]
    return max(complete, key=lambda row: (row.value, -row.number), default=None)


def format_line(row: Row, best: Row | None, num_trials: int) -> str:
    """Format what came of a trial as a line for a log."""
    settings = ", ".join(f"{name} {format_value(value)}" for name, value in row.settings.items())
    if row.error is not None:
        return f"trial {row.number} of {num_trials} failed ({settings}): {row.error}"
    of_best = (
        "" if best is None or best.value is None else f"; best {format_percentage(best.value)}, trial {best.number}"
    )
    epochs = f" after epoch {len(row.accuracies)}" if row.state == "pruned" else ""
    return (
        f"trial {row.number} of {num_trials} {row.state}{epochs}: validation accuracy {format_percentage(row.value)}, "
        f"{row.seconds or 0:.1f} s ({settings}){of_best}"
    )


def format_trials(rows: Sequence[Row], num_trials: int) -> str:
    """Format all trials as a table, the best one marked."""
    best = find_best(rows)
    names = list(rows[0].settings) if rows else []
    cells = [["trial", "state", "accuracy", "epochs", "time", *names, ""]]
    for row in rows:
        accuracy = row.value if row.value is not None else row.accuracies[-1] if row.accuracies else None
        cells.append(
            [
                f"{row.number}{' *' if row is best else ''}",
                row.state,
                format_percentage(accuracy),
                str(len(row.accuracies)),
                "-" if row.seconds is None else f"{row.seconds:.0f} s",
                *(format_value(value) for value in row.settings.values()),
                row.error or "",
            ]
        )
    num_told = sum(row.state not in ("running", "waiting") for row in rows)
    of_best = "" if best is None else f"; * best: {format_percentage(best.value)}"
    return f"{num_told} of {num_trials} trials are done{of_best}\n{format_table(cells, num_left=2)}"


def format_value(value: Any) -> str:
    """Format the value of a setting."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class RunShown(Reporter):
    """Shows how far the run of a trial has come, and lets a step come to its end before the process is stopped."""

    def __init__(self, name: str, stop: StopRequest, note: Callable[[str], object]) -> None:
        self._name = name
        self._stop = stop
        self._note = note
        self._shown = ExitStack()
        self._task = Task(name)
        self._batch_size = 0

    def note(self, text: str) -> None:
        self._note(f"note: {self._name}: {make_printable(text)}")

    def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
        self._batch_size = record["settings"]["batch_size"]
        total, done = num_steps * self._batch_size, first_step * self._batch_size
        self._task = self._shown.enter_context(track(self._name, total, "images", done=done))
        self._stop.deferring = True

    def step(self, step: Step) -> None:
        self._task.advance(self._batch_size)

    def epoch(self, line: dict[str, Any]) -> None:
        if "validation_accuracy" in line:
            self._task.detail = f"validation accuracy {format_percentage(line['validation_accuracy'])}"

    def evaluate(self, num_images: int) -> None:
        self.close()
        if self._stop.is_set():
            raise Interrupted("stopped before the evaluation; the same command goes on")

    def close(self) -> None:
        """End what is shown of the run."""
        self._stop.deferring = False
        self._shown.close()


@contextmanager
def shown_run(settings: RunSettings, stop: StopRequest, note: Callable[[str], object]) -> Iterator[Reporter]:
    """Yield what is told of a run: what is shown of it, and what its settings ask for."""
    from image_classifier.cli.mirror import open_mirror
    from image_classifier.cli.tensorboard import open_board
    from image_classifier.cli.tracking import open_tracker

    shown = RunShown(settings.run_name, stop, note)
    try:
        with open_mirror(settings) as mirror, open_tracker(settings) as tracker, open_board(settings) as board:
            yield Reporters(shown, mirror, tracker, board)
    finally:
        shown.close()
