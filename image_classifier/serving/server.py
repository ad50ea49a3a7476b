"""Starts and stops the server. Every accepted request is answered before the process ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image

from image_classifier.capture.places import LocalPlace, open_place
from image_classifier.capture.recorder import Recorder
from image_classifier.errors import ImageClassifierError, ModelError, SettingsError
from image_classifier.extras import check_extra
from image_classifier.published.predictor import Predictor, PublishedModel
from image_classifier.serving.app import App
from image_classifier.serving.auth import build_gate
from image_classifier.serving.batching import Batcher, Observer
from image_classifier.serving.candidates import Canary, Shadow, check_same_answers
from image_classifier.serving.protocol import Connection
from image_classifier.serving.service import Service
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.source import ModelSource
from image_classifier.serving.telemetry import Metrics, VersionMetrics, configure_logging

SWEEP_S = 0.5
"""Interval at which the deadlines of connections are checked."""

END_S = 5.0
"""Time that shutdown waits for captured images to be written, and for the shadow's last batch."""

BACKLOG = 2048
"""Length of the kernel's queue of connections that are not yet accepted."""

SWITCH_S = 0.0005
"""Interpreter's switch interval between threads (default: 5 ms)."""

logger = logging.getLogger(__name__)


class Server:
    """A server of one model: uvicorn with our own protocol and shutdown.

    Args:
        candidate: source of the canary or shadow; None if there is none.

    Attributes:
        exit_status: of the process: 0, or 1 if an inference thread died.
    """

    def __init__(
        self,
        settings: ServerSettings,
        source: ModelSource,
        listener: socket.socket,
        candidate: ModelSource | None = None,
    ) -> None:
        predictor = source.load()
        metrics = Metrics()
        metrics.show_model(source.name, predictor.model)
        self._candidate = candidate
        self._second = candidate.load() if candidate is not None else None
        self._shadow: Shadow | None = None
        if settings.drift_window:
            metrics.drift.watch(predictor.model, settings.drift_window)
        batcher = Batcher(
            predictor,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            timeout_s=settings.timeout_s,
            num_threads=settings.count_threads(),
            max_pixels=settings.max_pixels,
            observers=self._build_observers(settings, metrics),
            on_death=self._die,
        )
        self.exit_status = 0
        self._settings = settings
        self._source = source
        self._listener = listener
        self._reload, self._reload_keys = asyncio.Event(), asyncio.Event()
        recorder = build_recorder(settings, batcher.image_size, metrics)
        self._service = Service(settings, batcher, metrics, source.name, recorder)
        if self._second is not None:
            self._take_second(self._second)
        gate = build_gate(settings, metrics.count_key_reload)
        self._app = App(settings, self._service, gate, metrics, self._live)
        self._build_connection: Callable[[], Connection]
        self._accepting: asyncio.Server
        config = uvicorn.Config(
            self._app,
            ws="none",
            lifespan="on",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.grace_s),
        )
        self._uvicorn = uvicorn.Server(config)

    def _build_observers(self, settings: ServerSettings, metrics: Metrics) -> list[Observer]:
        """Build the batcher's observers: metrics, and with a second model the metrics by version and the shadow."""
        observers: list[Observer] = [metrics]
        if self._second is not None:
            observers.append(VersionMetrics(metrics))
            if settings.shadow:
                observe = metrics.shadow_difference.observe
                self._shadow = Shadow(self._second, settings.shadow_fraction, metrics.count_shadowed, observe)
                observers.append(self._shadow)
        return observers

    def run(self) -> int:
        """Serve until a signal arrives, and return the exit status."""
        configure_logging(self._settings.log_format, self._app.log_limit)
        self._uvicorn.run(sockets=[])  # no sockets: `_live` accepts connections, with our protocol
        return self.exit_status

    @asynccontextmanager
    async def _live(self, api: FastAPI) -> AsyncIterator[None]:
        """Run everything outside requests, from startup to shutdown."""
        loop = asyncio.get_running_loop()
        with suppress(ValueError):  # only the main thread gets signals
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop, number)
            loop.add_signal_handler(signal.SIGHUP, self._reload_all)
        self._service.batcher.start()
        if self._service.recorder is not None:
            await self._service.recorder.start()
        if self._shadow is not None:
            self._shadow.start()
        tasks = [loop.create_task(work()) for work in (self._sweep, self._watch_models, self._watch_keys)]
        self._build_connection = partial(Connection, self._app, self._uvicorn.server_state)
        self._accepting = await loop.create_server(self._build_connection, sock=self._listener, backlog=BACKLOG)
        self._announce()
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            self._service.batcher.stop()
            if self._service.recorder is not None:
                await self._service.recorder.stop(END_S)
            if self._shadow is not None:
                await asyncio.to_thread(self._shadow.stop, END_S)

    def _stop(self, number: int) -> None:
        """Report not ready, and end after `drain_s`; a second signal ends at once."""
        if self._service.is_draining:
            self._uvicorn.should_exit = self._uvicorn.force_exit = True
            return
        self._service.is_draining = True
        drain_s = self._settings.drain_s if number == signal.SIGTERM else 0
        asyncio.get_running_loop().call_later(drain_s, self._end)

    def _end(self) -> None:
        """Accept the connections in the kernel's queue and no more; uvicorn ends when all are answered.

        Closing a socket resets connections in its queue, and the event loop closes it later. So the socket must refuse
        new connections until then.
        """
        if self._uvicorn.should_exit:
            return
        loop, tasks = asyncio.get_running_loop(), self._uvicorn.server_state.tasks
        with suppress(OSError):  # the queue is empty
            while True:
                task = loop.create_task(self._connect(self._listener.accept()[0]))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.close()
        self._uvicorn.should_exit = True

    async def _connect(self, connection: socket.socket) -> None:
        with suppress(OSError):  # the client disconnected
            await asyncio.get_running_loop().connect_accepted_socket(self._build_connection, connection)

    def _die(self, error: BaseException) -> None:
        """Shut down because an inference thread died."""
        self.exit_status = 1
        self._service.is_draining = True
        self._end()

    def _announce(self) -> None:
        host, port = self._listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        model = self._service.batcher.classifier.model
        seconds, prefix = time.time() - _find_start(), self._settings.root_path
        logger.info(
            "serving %s, version %s, at http://%s:%d/%s (startup took %.2f s)",
            *(self._source.name, model.version, host, port, prefix and f", behind a proxy at {prefix}/", seconds),
        )

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        connections: set[Any] = self._uvicorn.server_state.connections
        now = loop.time()
        while True:
            await asyncio.sleep(SWEEP_S)
            before, now = now, loop.time()
            if now - before > 2 * SWEEP_S:  # the loop was blocked: first read what clients sent meanwhile
                continue
            for connection in list(connections):
                connection.sweep(now)

    def _reload_all(self) -> None:
        self._reload.set()
        self._reload_keys.set()

    async def _watch_keys(self) -> None:
        """Reload the keys regularly, apart from the model, whose loading may take longer than keys live."""
        gate = self._app.gate
        every_s = min(self._settings.reload_every_s or math.inf, gate.refresh_s)
        while True:
            await wait(self._reload_keys, every_s)
            await asyncio.to_thread(gate.refresh)

    async def _watch_models(self) -> None:
        """Load another version when the alias or the file changes."""
        every_s = self._settings.reload_every_s or math.inf
        while True:
            await wait(self._reload, every_s)
            await self._reload_model(self._source, self._take_model)
            if self._candidate is not None:
                await self._reload_model(self._candidate, self._take_second)

    async def _reload_model(self, source: ModelSource, take: Callable[[Predictor], None]) -> None:
        """Load a model if it changed, and replace the current one; after an error, keep the current one."""
        reloads = self._app.metrics.reloads
        try:
            predictor = await asyncio.to_thread(source.load_if_moved)
            if predictor is None:
                return
            take(predictor)
        except Exception as error:
            reloads.labels("failed").inc()
            trace = None if isinstance(error, ImageClassifierError) else error
            logger.error("reloading the model failed, the previous one stays in service: %s", error, exc_info=trace)
        else:
            reloads.labels("done").inc()
            logger.info("now serving version %s", predictor.model.version)

    def _take_model(self, predictor: Predictor) -> None:
        """Make a model the champion."""
        size, served = predictor.model.image_size, self._service.batcher.image_size
        if size != served:  # which clients rely on
            reason = f"takes images of {size} x {size} pixels instead of {served} x {served}"
            raise ModelError(f"{predictor.model.path} {reason}; restart the server to serve it")
        if self._second is not None:
            check_same_answers(self._second.model, predictor.model)
        self._service.batcher.classifier = predictor
        self._app.metrics.show_model(self._source.name, predictor.model)
        self._watch_drift(predictor.model)

    def _take_second(self, predictor: Predictor) -> None:
        """Make a model the canary or shadow."""
        service = self._service
        check_same_answers(predictor.model, service.batcher.classifier.model)
        self._second = predictor
        if self._shadow is not None:
            self._shadow.classifier = predictor
        else:
            service.batcher.canary = Canary(predictor, self._settings.canary_fraction)
        service.metrics.show_candidate("canary" if self._shadow is None else "shadow", predictor.model)

    def _watch_drift(self, model: PublishedModel) -> None:
        """Watch another version for drift. A missing reference does not stop the server."""
        try:
            if self._settings.drift_window:
                self._app.metrics.drift.watch(model, self._settings.drift_window)
        except ModelError as error:
            logger.warning("the metrics show no drift: %s", error)


async def wait(event: asyncio.Event, within_s: float) -> None:
    """Wait for an event and clear it, or for a number of seconds, which may be infinite."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), None if within_s == math.inf else within_s)
    event.clear()


def build_recorder(settings: ServerSettings, image_size: int, metrics: Metrics) -> Recorder | None:
    """Build the recorder of answered images; None if capture is off.

    Raises:
        SettingsError: the extra `capture` or fsspec's library for the URL is missing.
    """
    if not settings.capture:
        return None
    check_extra("pyarrow", "capture")
    place = open_place(settings.capture)  # fail now rather than in the writer process
    if isinstance(place, LocalPlace):
        place.check_writable()
    return Recorder(
        settings.capture,
        image_size=image_size,
        fraction=settings.capture_fraction,
        flush_s=settings.capture_flush_s,
        max_bytes=settings.capture_max_bytes,
        memory_bytes=settings.capture_memory_bytes,
        count=metrics.count_captured,
    )


def keep_loop_free() -> None:
    """Reduce pauses of the event loop.

    Garbage collection skips the objects that exist now; scanning them would take 50 ms and more. Threads that parse or
    decode yield to the event loop sooner than by Python's default.
    """
    gc.freeze()
    gc.enable()
    sys.setswitchinterval(SWITCH_S)


def _find_start() -> float:
    """Find the start time of this process, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def bind(settings: ServerSettings) -> socket.socket:
    """Bind the address of the settings.

    Raises:
        SettingsError: it is in use, or is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(
            f"--host {settings.host} --port {settings.port}: {reason}; choose another address, or --port 0"
        ) from error
    return listener


def serve(settings: ServerSettings, source: ModelSource, candidate: ModelSource | None = None) -> int:
    """Serve until a signal arrives, and return the exit status.

    Args:
        candidate: source of the canary or shadow; None if there is none.

    Raises:
        ImageClassifierError: the model or the keys cannot be loaded, or the address cannot be bound.
    """
    with bind(settings) as listener:
        server = Server(settings, source, listener, candidate)
        Image.preinit()  # import the decoders before the first request
        keep_loop_free()
        return server.run()
