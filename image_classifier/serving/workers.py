"""Several processes that listen on one socket: each is a whole server, one more watches over them."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import FrameType

from prometheus_client import multiprocess

from image_classifier.serving.auth import build_gate
from image_classifier.serving.server import ModelSource, Resolve, bind, keep_out, run
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.telemetry import MULTIPROCESS, configure_logging
from image_classifier.storage import scratch_folder

MIN_LIFE_S = 10.0
"""A worker that ends by itself sooner is not started again: it would end again."""

logger = logging.getLogger(__name__)


def supervise(settings: ServerSettings, resolve: Resolve | None) -> int:
    """Keep workers running until a signal comes, and return the exit status.

    Raises:
        ImageClassifierError: the model, the keys or the address are not as they should be.
    """
    configure_logging(settings.log_format)
    model = ModelSource(settings, resolve).load().model  # what is wrong is said once, and before anything listens
    build_gate(settings)
    with bind(settings) as listener, scratch_folder() as counts:
        os.environ[MULTIPROCESS] = str(counts)
        listener.listen(2048)
        with _Crew(settings, resolve, listener) as crew:
            host, port = listener.getsockname()[:2]
            logger.info("serving version %s at http://%s:%d/ with %d workers", model.version, host, port, len(crew.all))
            return crew.watch()


class _Crew:
    """The workers, and the signals that are meant for them."""

    def __init__(self, settings: ServerSettings, resolve: Resolve | None, listener: socket.socket) -> None:
        self._arguments = (settings, resolve, listener)
        self._stop_signal = 0
        self._stopping, self._running = multiprocessing.Pipe(duplex=False)  # its end is the word to stop
        self._deadline_s = settings.drain_s + settings.grace_s + 5
        self.all: dict[SpawnProcess, float] = {}

    def __enter__(self) -> _Crew:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._pass_on) for number in numbers}
        for _ in range(self._arguments[0].workers):
            self._start()
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.all:
            worker.kill()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _start(self) -> None:
        worker = multiprocessing.get_context("spawn").Process(target=work, args=(*self._arguments, os.getpid()))
        worker.start()
        self.all[worker] = time.monotonic()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            self._stop_signal = self._stop_signal or number
            self._running.close()
        for worker in self.all:
            if worker.pid is not None and worker.is_alive():
                os.kill(worker.pid, number)

    def watch(self) -> int:
        """Start again what dies, until a signal comes; then wait for all and return the worst of their statuses."""
        settings, _, listener = self._arguments
        status, deadline, quiet_at = 0, float("inf"), float("inf")
        while self.all and time.monotonic() < deadline:
            others = [] if self._stop_signal else [self._stopping]
            timeout_s = max(0.0, min(0.5, quiet_at - time.monotonic()))
            wait([*others, *(worker.sentinel for worker in self.all)], timeout_s)
            for worker, started_at in list(self.all.items()):
                if worker.is_alive():
                    continue
                del self.all[worker]
                multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]  # no types there
                if self._stop_signal:
                    # One that was still starting ends by the signal itself, and has accepted nothing.
                    status = status or int(worker.exitcode not in (0, -self._stop_signal))
                elif time.monotonic() - started_at < MIN_LIFE_S:
                    logger.critical("worker %d ended with status %s at its start", worker.pid, worker.exitcode)
                    return 1
                else:
                    logger.error("worker %d ended with status %s; another takes its place", worker.pid, worker.exitcode)
                    self._start()
            if self._stop_signal and deadline == float("inf"):
                deadline = time.monotonic() + self._deadline_s
                quiet_at = time.monotonic() + (settings.drain_s if self._stop_signal == signal.SIGTERM else 0)
            if time.monotonic() >= quiet_at:  # before the last worker closes the socket, which then is the end of it
                keep_out(listener)
                listener.close()
                quiet_at = float("inf")
        return status or int(bool(self.all))


def work(settings: ServerSettings, resolve: Resolve | None, listener: socket.socket, supervisor: int) -> None:
    """Be one worker: load the model and serve on the shared socket."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)  # nobody would start or stop an orphan
    if os.getppid() != supervisor:
        return
    source = ModelSource(settings, resolve)
    raise SystemExit(run(settings, source, source.load(), build_gate(settings), listener))
