"""Which file is decoded next: fair among callers, and with a lane that is never held up by what takes long.

The next file is one of the caller who has used the least decoding time recently (least attained service), so that who
sends much, or what takes long, delays himself and hardly anybody else.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

HALF_LIFE_S = 10.0
"""Seconds after which decoding time that was used counts half."""

MAX_CALLERS = 1000
"""From so many on, callers of whom nothing waits or is decoded are forgotten."""

Item = TypeVar("Item")


@dataclass(eq=False)
class _Caller(Generic[Item]):
    cheap: deque[Item] = field(default_factory=deque)
    costly: deque[Item] = field(default_factory=deque)
    seconds: float = 0.0
    charged_at: float = 0.0

    def charge(self, seconds: float, now: float) -> None:
        self.seconds = self.count_seconds(now) + seconds
        self.charged_at = now

    def count_seconds(self, now: float) -> float:
        return self.seconds * math.exp2((self.charged_at - now) / HALF_LIFE_S)


@dataclass(eq=False)
class _Work(Generic[Item]):
    caller: _Caller[Item]
    began: float
    charged_until: float


class FairQueue(Generic[Item]):
    """A queue of items by caller, for several threads; the time between two `take` of a thread is its caller's."""

    def __init__(self) -> None:
        self._callers: dict[str, _Caller[Item]] = {}
        self._work: dict[int, _Work[Item]] = {}  # by thread
        self._change = threading.Condition()
        self._is_closed = False

    def put(self, item: Item, caller: str, *, is_cheap: bool) -> None:
        """Let an item wait.

        Args:
            caller: who pays for it with the time that it takes.
            is_cheap: it may be taken by threads that take nothing else.
        """
        with self._change:
            if caller not in self._callers:
                if len(self._callers) >= MAX_CALLERS:
                    self._forget_idle()
                self._callers[caller] = _Caller()
            waiting = self._callers[caller]
            (waiting.cheap if is_cheap else waiting.costly).append(item)
            self._change.notify_all()

    def take(self, *, only_cheap: bool) -> Item | None:
        """End this thread's last item, and wait for the next.

        Returns:
            The item; None once the queue is closed, nothing waits, and all threads have ended theirs.
        """
        thread = threading.get_ident()
        with self._change:
            self._charge(time.perf_counter())
            if self._work.pop(thread, None) is not None:
                self._change.notify_all()
            while True:
                now = time.perf_counter()
                self._charge(now)
                able = [caller for caller in self._callers.values() if caller.cheap or caller.costly and not only_cheap]
                if able:
                    caller = min(able, key=lambda each: each.count_seconds(now))
                    self._work[thread] = _Work(caller, now, now)
                    return (caller.costly if caller.costly and not only_cheap else caller.cheap).popleft()
                if self._is_closed and not self._work:
                    return None
                self._change.wait()

    def close(self) -> None:
        """Let the threads end after what waits."""
        with self._change:
            self._is_closed = True
            self._change.notify_all()

    def list_began(self) -> list[float]:
        """List when each thread that has an item took it, by `time.perf_counter`."""
        with self._change:
            return [work.began for work in self._work.values()]

    def _charge(self, now: float) -> None:
        for work in self._work.values():
            work.caller.charge(now - work.charged_until, now)
            work.charged_until = now

    def _forget_idle(self) -> None:
        busy = {id(work.caller) for work in self._work.values()}
        self._callers = {
            name: caller
            for name, caller in self._callers.items()
            if caller.cheap or caller.costly or id(caller) in busy
        }
