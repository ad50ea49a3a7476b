"""SIGINT and SIGTERM as a request to stop. Free of torch, so that it is heard while torch is imported."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Self

from image_classifier.errors import Interrupted


class StopRequest:
    """SIGINT and SIGTERM as a request: while steps are taken it is deferred to the end of the step.

    At any other time it ends the work at once, which is safe because every file is written whole or not at all.
    A second signal ends the process where it stands.
    """

    def __init__(self) -> None:
        self.deferring = False
        self.advice = ""
        self._signal: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_set(self) -> bool:
        """Say whether a signal has come."""
        return self._signal is not None

    @property
    def exit_status(self) -> int:
        """128 and the signal's number, as shells have it."""
        return 128 + (self._signal or signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = signal.Signals(number)
        if not self.deferring:
            raise Interrupted(f"stopped by {self._signal.name}{self.advice}")
