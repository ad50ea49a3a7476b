"""Progress of long tasks: a bar on a terminal, otherwise a line at least every 30 seconds.

Whatever works for long says so with `track`. Nothing is shown until a command asks for it with `shown`, so the library
is silent. All is written to stderr, by a thread: the work itself does no more than count.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

INTERVAL_S = 30.0
"""Longest time without a line, where there is no terminal."""
DELAY_S = 2.0
"""Time after which a terminal shows work at all."""
_REFRESH_S = 0.1


@dataclass(eq=False)
class Task:
    """A piece of work; `done` of `total` units, where they can be counted.

    Attributes:
        detail: shown behind the figures, such as a loss.
        stays: on a terminal, shown at once, and left standing when the work is over.
    """

    title: str
    total: int | None = None
    unit: str = ""
    done: int = 0
    detail: str = ""
    stays: bool = False
    started: float = field(default_factory=time.monotonic)

    def advance(self, count: int = 1) -> None:
        """Count units that are done."""
        self.done += count

    def format(self) -> str:
        """Format what is done so far as a line for a log."""
        seconds = f"{time.monotonic() - self.started:.0f} s"
        if self.total:
            counted = f"{self.done:,} of {self.total:,} {self.unit} ({self.done / self.total:.0%}), "
        else:
            counted = f"{self.done:,} {self.unit}, " if self.unit else ""
        return f"{self.title}: {counted}{seconds}{f', {self.detail}' if self.detail else ''}"


@contextmanager
def track(
    title: str, total: int | None = None, unit: str = "", *, done: int = 0, stays: bool = False
) -> Iterator[Task]:
    """Yield a task whose progress is shown until the block ends, if a command shows any.

    Args:
        unit: what is counted, in the plural; nothing where it cannot be.
        done: how much was done before.
    """
    task = Task(title, total, unit, done, stays=stays)
    display = _display
    if display is None:
        yield task
        return
    display.begin(task)
    try:
        yield task
    finally:
        display.end(task)


def say(text: str) -> None:
    """Write a line to stderr, above the bars of a terminal."""
    if _display is None:
        print(text, file=sys.stderr, flush=True)
    else:
        _display.write(text)


@contextmanager
def shown(title: str) -> Iterator[None]:
    """Show the progress of what is tracked within the block, and of the block itself under this title.

    Shown within another block, nothing changes.
    """
    global _display
    if _display is not None or sys.stderr is None:
        yield
        return
    _display = _Display(title)
    try:
        yield
    finally:
        display, _display = _display, None
        display.stop()


@contextmanager
def paused() -> Iterator[None]:
    """Leave the terminal alone within the block, in which a person is asked for something."""
    if _display is None:
        yield
        return
    with _display.paused():
        yield


class _Display:
    """Shows the tasks that go on, the outermost first; the first one, the command itself, where there is no other."""

    def __init__(self, title: str) -> None:
        self._file = sys.stderr
        self._is_terminal = self._file.isatty()
        self._tasks = [Task(title)]
        self._bars: dict[Task, tqdm[Any]] = {}
        self._written_at = time.monotonic()
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def begin(self, task: Task) -> None:
        with self._lock:
            self._tasks.append(task)

    def end(self, task: Task) -> None:
        with self._lock:
            self._tasks.remove(task)
            bar = self._bars.pop(task, None)
            if bar is None and self._is_terminal and task.stays:
                bar = self._build_bar(task)
            if bar is not None:
                self._update(bar, task)
                bar.close()

    def write(self, text: str) -> None:
        with self._lock:
            self._written_at = time.monotonic()
            if self._bars:
                next(iter(self._bars.values())).write(text, file=self._file)
            else:
                print(text, file=self._file, flush=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self._lock:
            for bar in self._bars.values():
                bar.clear()
            yield

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        for bar in self._bars.values():
            bar.close()

    def _run(self) -> None:
        while not self._stopped.wait(self._compute_pause()):
            with self._lock, suppress(OSError, ValueError):  # whoever read it has gone
                self._refresh() if self._is_terminal else self._write_line()

    def _compute_pause(self) -> float:
        return _REFRESH_S if self._is_terminal else max(0.0, self._written_at + INTERVAL_S - time.monotonic())

    def _write_line(self) -> None:
        if self._compute_pause() == 0:
            self.write("; ".join(task.format() for task in self._tasks[1:] or self._tasks))

    def _refresh(self) -> None:
        for task in self._tasks[1:]:
            if task in self._bars:
                self._update(self._bars[task], task)
            elif task.stays or time.monotonic() - task.started >= DELAY_S:
                self._bars[task] = self._build_bar(task)

    def _build_bar(self, task: Task) -> tqdm[Any]:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # its own thread, which would do what this one does
        bar = tqdm(
            desc=task.title,
            total=task.total,
            initial=task.done,
            unit=f" {task.unit}",
            unit_scale=True,
            dynamic_ncols=True,
            leave=task.stays,
            bar_format=None if task.unit else "{desc}: {elapsed}",
            mininterval=0,
            miniters=0,
            file=self._file,
        )
        bar.start_t -= time.monotonic() - task.started
        return bar

    def _update(self, bar: tqdm[Any], task: Task) -> None:
        bar.total = task.total
        bar.set_postfix_str(task.detail, refresh=False)
        bar.update(task.done - bar.n)


_display: _Display | None = None
