"""From settings to a listening server, and from SIGTERM to its end: nothing that was accepted is lost."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import math
import os
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import uvicorn
from PIL import Image

from image_classifier.errors import ImageClassifierError, SettingsError
from image_classifier.published.folder import MANIFEST
from image_classifier.published.predictor import Predictor, load_predictor
from image_classifier.serving.app import App
from image_classifier.serving.auth import Gate, build_gate
from image_classifier.serving.batching import Batcher
from image_classifier.serving.protocol import GuardedProtocol
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.telemetry import Metrics, configure_logging

DEFAULT_NAME = "image_classifier"
SWEEP_S = 0.5
FRESH_S = 1.0
"""How long the first request of a connection that was just made is waited for at the end."""

ACCEPT_S = 0.05
"""How long connections that the kernel has already made are still taken after new ones are kept out."""

MAX_ACCEPTED = 16
"""Connections that are taken in one turn of the event loop."""

RETRY_S = 1.0
"""After so long connections are taken again, where the process had no file descriptor for another one."""

logger = logging.getLogger(__name__)

Resolve = Callable[[str], tuple[Path, str]]
"""From models:/NAME@ALIAS to the published folder, and the version that the alias names now."""


class ModelSource:
    """Where the model comes from, and which version of it was loaded last.

    Args:
        resolve: looks up registry names; None where the model is a path.
    """

    def __init__(self, settings: ServerSettings, resolve: Resolve | None) -> None:
        self._settings = settings
        self._resolve = resolve
        self._loaded: object = None

    @property
    def name(self) -> str:
        """The model's name in the Open Inference Protocol."""
        settings = self._settings
        registered = settings.model.removeprefix("models:/").partition("@")[0] if self._resolve else ""
        return settings.model_name or registered or DEFAULT_NAME

    def load(self) -> Predictor:
        """Load what the name stands for now.

        Raises:
            ImageClassifierError: it is missing, damaged, not signed as asked for, or not registered.
        """
        predictor = self.load_if_moved()
        assert predictor is not None
        return predictor

    def load_if_moved(self) -> Predictor | None:
        """Load what the name stands for now, if that is something else than before."""
        settings = self._settings
        path, version, mark = self._find()
        if mark == self._loaded:
            return None
        return_freed_memory()
        predictor = load_predictor(
            path,
            public_key=settings.public_key,
            num_threads=1,
            num_lone_threads=settings.count_threads(),
            precision=settings.precision,
            version=version,
        )
        predictor.measure()
        self._loaded = mark
        return predictor

    def _find(self) -> tuple[Path, str | None, object]:
        """Find the path, the version if it has a name, and what differs when it is another model."""
        if self._resolve is not None:
            path, version = self._resolve(self._settings.model)
            return path, version, (path, version)
        path = Path(self._settings.model).resolve()  # a link may have been pointed somewhere else
        try:
            facts = (path / MANIFEST if path.is_dir() else path).stat()
        except OSError:
            return path, None, path  # loading says what is wrong
        return path, None, (path, facts.st_mtime_ns, facts.st_ino, facts.st_size)


class Server(uvicorn.Server):
    """uvicorn's server with our own beginning and end.

    Attributes:
        exit_status: of the process: 0, or 1 if nothing computes any more.
    """

    def __init__(self, config: uvicorn.Config, app: App, source: ModelSource, listener: socket.socket) -> None:
        super().__init__(config)
        self.exit_status = 0
        self._app = app
        self._source = source
        self._listener = listener
        self._stop_signal = 0
        self._reload = asyncio.Event()
        self._connecting: set[asyncio.Task[None]] = set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after the first signal; after a second one without waiting for anything."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self._stop_signal = self._stop_signal or sig

    def die(self, error: BaseException) -> None:
        """Stop because nothing computes any more."""
        self.exit_status = 1
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])  # of none: `_accept` takes the connections
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        self._listener.listen(self.config.backlog)
        self._listen()
        with suppress(ValueError):  # signals come to the main thread alone
            loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        self._tasks = [loop.create_task(self._sweep()), loop.create_task(self._follow())]
        if self.config.workers == 1:
            self._announce()

    def _announce(self) -> None:
        host, port = self._listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        model = self._app.batcher.classifier.model
        seconds = time.time() - _find_start()
        logger.info(
            "serving %s, version %s, at http://%s:%d%s/ (ready %.2f s after the start)",
            *(self._source.name, model.version, host, port, self.config.root_path, seconds),
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say not ready, still take requests, then take no more, and finish what was accepted."""
        settings = self._app.settings
        self._app.is_draining = True
        deadline = time.monotonic() + (settings.drain_s if self._stop_signal == signal.SIGTERM else 0)
        while time.monotonic() < deadline and not self.force_exit and self.exit_status == 0:
            await asyncio.sleep(0.05)
        if self._stop_signal:
            if self.config.workers == 1:  # else the workers' supervisor does so, for all of them
                keep_out(self._listener)
            await asyncio.sleep(ACCEPT_S)
            await self._take_last()
        else:  # nothing computes any more: what waits is for the other workers, if there are some
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        deadline = time.monotonic() + FRESH_S
        while any(self._is_fresh(connection) for connection in self.server_state.connections):
            if time.monotonic() > deadline or self.force_exit or self.exit_status:
                break
            await asyncio.sleep(0.02)
        for task in self._tasks[1:]:
            task.cancel()
        await super().shutdown(sockets)
        self._tasks[0].cancel()

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:  # it is open
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        """Take some of the connections that the kernel has made; what waits on is there again in the loop's next turn.

        The loop's own server takes one a turn, and a turn may compute a batch: of many clients that come together the
        last would wait a long time. All at once would be those of the other workers too, or more than can be refused.
        """
        room = self._app.settings.max_connections - len(self.server_state.connections) - len(self._connecting)
        try:
            for _ in range(min(MAX_ACCEPTED, max(1, room))):
                self._take(self._listener.accept()[0])
        except (BlockingIOError, ConnectionAbortedError):  # there are no more, or a client has left
            pass
        except OSError as error:
            logger.error("no connection can be taken for %g s: %s", RETRY_S, error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(RETRY_S, self._listen)

    def _take(self, connection: socket.socket) -> None:
        task = asyncio.get_running_loop().create_task(self._connect(connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket) -> None:
        with suppress(OSError):  # its client has left
            await asyncio.get_running_loop().connect_accepted_socket(self._build_protocol, connection)

    async def _take_last(self) -> None:
        """Take all that the kernel has for the listening socket, and close it at once.

        Between the loop's own turn and a closing there may be a batch, and the connections of that time be reset.
        """
        asyncio.get_running_loop().remove_reader(self._listener)
        while True:
            try:
                connection = self._listener.accept()[0]
            except ConnectionAbortedError:
                continue
            except OSError:  # there are no more
                self._listener.close()
                break
            self._take(connection)
        while self._connecting:
            await asyncio.wait(self._connecting)

    def _build_protocol(self) -> GuardedProtocol:
        return GuardedProtocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    @staticmethod
    def _is_fresh(connection: object) -> bool:
        """Say whether a connection was made and has not sent a request yet, which may be on its way."""
        return isinstance(connection, GuardedProtocol) and not connection.has_begun

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            now = loop.time()
            for connection in list(self.server_state.connections):
                connection.sweep(now)  # type: ignore[union-attr]  # all are GuardedProtocol

    async def _follow(self) -> None:
        """Load another version when the alias has moved; the one before serves on until then, or if that fails."""
        every_s = self._app.settings.reload_every_s or None
        reloads = self._app.metrics.reloads
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._reload.wait(), every_s)
            self._reload.clear()
            try:
                predictor = await asyncio.to_thread(self._source.load_if_moved)
            except ImageClassifierError as error:
                reloads.labels("failed").inc()
                logger.error("the model was not loaded again, the one before serves on: %s", error)
            except Exception:
                reloads.labels("failed").inc()
                logger.exception("the model was not loaded again, the one before serves on")
            else:
                if predictor is not None:
                    self._app.batcher.replace_classifier(predictor)
                    self._app.metrics.show_model(self._source.name, predictor.model)
                    reloads.labels("done").inc()
                    logger.info("serving version %s from now on", predictor.model.version)


def keep_out(listener: socket.socket) -> None:
    """Let the kernel drop new connections to a listening socket, so that closing it resets none.

    Whoever asks for a connection gets no answer, asks again a second later, and is refused then. Closing alone
    would reset the connections that the kernel has made and nobody has accepted yet. (Linux's socket filters; the
    program is: load the byte of the TCP flags; if SYN is set drop the packet, else pass it.)
    """
    instructions = [(0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *words) for words in instructions))
    attach_filter = 26  # SO_ATTACH_FILTER, which the socket module does not name
    with suppress(OSError):  # another kernel: then closing is all that there is
        listener.setsockopt(
            socket.SOL_SOCKET, attach_filter, struct.pack("HL", len(instructions), ctypes.addressof(program))
        )


def return_freed_memory() -> None:
    """Tell glibc's malloc to map blocks from 64 KB on by themselves: what loading a model frees is no longer ours.

    Otherwise the holes between a network's weights would stay the process's memory.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    with suppress(OSError, AttributeError):  # another library: then its ways are all that there is
        ctypes.CDLL(None).mallopt(mmap_threshold, 64 * 2**10)


def _find_start() -> float:
    """Find when this process was started, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def bind(settings: ServerSettings) -> socket.socket:
    """Bind the address of the settings.

    Raises:
        SettingsError: it is in use, or not one of this machine's.
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
    listener.set_inheritable(True)
    return listener


def serve(settings: ServerSettings, resolve: Resolve | None = None) -> int:
    """Serve until a signal comes, and return the exit status.

    The model is loaded and checked before anything listens, also where several workers load it again.

    Raises:
        ImageClassifierError: the model, the keys or the address are not as they should be.
    """
    if settings.workers > 1:
        from image_classifier.serving.workers import supervise

        return supervise(settings, resolve)
    source = ModelSource(settings, resolve)
    predictor = source.load()
    gate = build_gate(settings)
    with bind(settings) as listener:
        return run(settings, source, predictor, gate, listener)


def run(
    settings: ServerSettings, source: ModelSource, predictor: Predictor, gate: Gate, listener: socket.socket
) -> int:
    """Serve a loaded model on a bound socket until a signal comes, and return the exit status."""
    configure_logging(settings.log_format)
    Image.preinit()  # the decoders, which would be imported while the first client waits
    metrics = Metrics()
    metrics.show_model(source.name, predictor.model)
    batcher = Batcher(
        predictor,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        timeout_s=settings.timeout_s,
        num_threads=settings.count_threads(),
        max_pixels=settings.max_pixels,
        observer=metrics,
        on_death=lambda error: server.die(error),
    )
    app = App(settings, batcher, gate, metrics, source.name)
    config = uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        lifespan="on",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        root_path=settings.root_path,
        workers=settings.workers,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=math.ceil(settings.grace_s),
    )
    server = Server(config, app, source, listener)
    server.run(sockets=[listener])
    return server.exit_status
