"""Take connections from a listening socket, and at the end all that are there."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress

BACKLOG = 2048
"""Connections that the kernel holds until they are taken."""

RETRY_S = 1.0
"""After so long connections are taken again, where the process had no file descriptor for another one."""

logger = logging.getLogger(__name__)


class Acceptor:
    """Takes the connections of a socket.

    The event loop's own server lets the last of many clients that come together wait longer, and loses what the kernel
    has when it is closed.

    Args:
        listener: bound.
        build: builds the protocol of a connection.
    """

    def __init__(self, listener: socket.socket, build: Callable[[], asyncio.Protocol]) -> None:
        self._listener = listener
        self._build = build
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._go_on()

    def stop(self) -> None:
        """Take all that the kernel has for the socket, and close it at once: closing resets what nobody has taken."""
        if self._listener.fileno() < 0:
            return
        self._loop.remove_reader(self._listener)
        with suppress(OSError):  # there are no more
            while True:
                with suppress(ConnectionAbortedError):
                    self._take(self._listener.accept()[0])
        self._listener.close()

    def _go_on(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        """Take one; what waits on is there again in the loop's next turn."""
        try:
            self._take(self._listener.accept()[0])
        except (BlockingIOError, ConnectionAbortedError):  # its client has left
            pass
        except OSError as error:
            logger.error("no connection can be taken for %g s: %s", RETRY_S, error)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(RETRY_S, self._go_on)

    def _take(self, connection: socket.socket) -> None:
        task = self._loop.create_task(self._connect(connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket) -> None:
        with suppress(OSError):  # its client has left
            await self._loop.connect_accepted_socket(self._build, connection)
