"""A thread pool: each thread takes the next task when it is free.

Each piece is computed by one thread, in one order of operations, so that neither the number of threads nor which of
them takes which piece can change a bit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch

from image_classifier.errors import SettingsError

Arithmetic = Callable[[], AbstractContextManager[object]]

Item = TypeVar("Item")
Result = TypeVar("Result")

_CGROUPS, _MY_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Threads:
    """A fixed number of threads; with one, the caller's own. Torch uses no others from then on.

    Args:
        num_threads: 0 for as many as this process may use cores.
        arithmetic: makes what is entered, by each thread, around what is to be computed as the settings say.

    Raises:
        SettingsError: this process may not start so many.
    """

    def __init__(self, num_threads: int = 0, arithmetic: Arithmetic = nullcontext) -> None:
        self.arithmetic = arithmetic
        self.num_threads = num_threads or count_cores()
        if (num_startable := _count_startable(self.num_threads)) < self.num_threads:
            raise SettingsError(
                f"--num_threads {self.num_threads}: this process may start only {num_startable} threads; "
                "choose fewer, or raise the limit (ulimit -u)"
            )
        torch.set_num_threads(1)  # of an operation
        self._pool = None
        if self.num_threads > 1:
            self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="compute")

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Call a function on each item; yield the results in the items' order.

        Raises:
            Exception: what the first call that failed raised.
        """
        items = list(items)
        if self._pool is None or len(items) < 2:
            yield from map(function, items)
            return
        futures = [self._pool.submit(function, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)


def count_cores() -> int:
    """Count the cores that this process may really use: by its affinity and the CPU quota of its cgroups, and where
    torchrun started several processes on this machine, its part of them.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(num_cores, _read_quota()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _read_quota() -> int:
    """Read how many cores the cgroups of this process leave it, a part of one counted as one (Linux: cgroups(7))."""
    try:
        lines = _MY_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 2**31
    quotas = [2.0**31]
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = _CGROUPS / controllers if controllers else _CGROUPS
        folder = top / place.lstrip("/")
        for group in (folder, *folder.parents):
            try:
                if controllers:
                    quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (group / "cpu.max").read_text().split()
                if quota.strip() not in ("max", "-1"):
                    quotas.append(int(quota) / int(period))
            except (OSError, ValueError):
                pass
            if group == top:
                break
    return -int(-min(quotas) // 1)


def _count_startable(wanted: int) -> int:
    """Count how many of the wanted threads this process may start."""
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in range(wanted)]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError:  # a limit on processes or on memory
        pass
    finally:
        end.set()
    for thread in started:
        thread.join()
    return len(started)
