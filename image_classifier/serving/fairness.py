"""A fair queue of files to decode, with a lane that costly files never block.

The next file comes from the caller who recently used the least decoding time (least attained service). A caller who
sends many or costly files mainly delays itself.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

HALF_LIFE_S = 10.0
"""Half-life of a caller's used decoding time."""

MAX_CALLERS = 1000
"""Number of callers at which idle ones are forgotten."""

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
    """A thread-safe queue of items by caller. The caller is charged the time between two `take` calls of a thread."""

    def __init__(self) -> None:
        self._callers: dict[str, _Caller[Item]] = {}
        self._work: dict[int, _Work[Item]] = {}  # by thread
        self._change = threading.Condition()
        self._is_closed = False

    def put(self, item: Item, caller: str, *, is_cheap: bool) -> None:
        """Add an item.

        Args:
            caller: is charged the time that the item takes.
            is_cheap: threads that take only cheap items may take it.
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
        """Finish this thread's previous item, and wait for the next.

        Returns:
            The item; None once the queue is closed and empty and all threads have finished their items.
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
        """Let `take` return None once everything is done."""
        with self._change:
            self._is_closed = True
            self._change.notify_all()

    def list_began(self) -> list[float]:
        """List the start times of the items that are being processed, by `time.perf_counter`."""
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
