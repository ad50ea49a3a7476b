"""Clients that have hostile exchanges with a server, many at once, and judge how it bears them."""

from __future__ import annotations

import asyncio
import math
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from tests.hostile import ANYTHING, Exchange, Grammar

QUIET_S = 0.4
"""After so long without a byte a client takes it that nothing more comes."""

ANSWER_S = 20.0
"""For so long an answer is waited for that must come."""

DEAF_S = 2.0
"""For so long a client tries to send to a server whose answers it does not read."""

MAX_CONNECT_S = 20.0
BEAT_S = 0.05
LATE_S = 0.9
"""A client that was itself late by so much may have been cut off for it: what was planned to be slow takes 2 s."""

BUSY = (429, 503)
"""What may come instead of any other answer, when there is much to do."""


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int
    body: bytes
    is_last: bool


@dataclass(frozen=True)
class Outcome:
    """What came of an exchange.

    Attributes:
        end: `closed` or `reset` by the server, `open` when the client left, or `refused` before it began.
        rest: what came behind the last whole answer.
        late_s: for so long the client had something to do meanwhile, and no processor.
    """

    answers: tuple[Answer, ...]
    end: str
    seconds: float
    rest: bytes = b""
    late_s: float = 0.0

    @property
    def statuses(self) -> tuple[int, ...]:
        """The statuses of the answers."""
        return tuple(answer.status for answer in self.answers)


def parse_answers(content: bytes, with_head: bool = False) -> tuple[list[Answer], bytes]:
    """Parse what a server sent; return the whole answers, and what is left.

    Args:
        with_head: whether some of the requests may have been HEAD, whose answers have a length and no body.
    """
    answers: list[Answer] = []
    while True:
        head, end, rest = content.partition(b"\r\n\r\n")
        found = re.match(rb"HTTP/1\.1 (\d{3}) [^\r\n]*(?:\r\n|$)", head)
        if not end or found is None:
            return answers, content
        status, fields = int(found[1]), head.lower()
        length = re.search(rb"\r\ncontent-length: (\d+)", fields)
        size = int(length[1]) if length and status >= 200 and status not in (204, 304) else 0
        if with_head and (not rest or rest.startswith(b"HTTP/1.")):  # none of the bodies begins like that
            size = 0
        if len(rest) < size:
            return answers, content
        if status >= 200:
            answers.append(Answer(status, rest[:size], b"\r\nconnection: close" in fields))
        content = rest[size:]


async def play(port: int, exchange: Exchange, wait_s: float) -> Outcome:
    """Have an exchange with the server on a port of this machine.

    Args:
        wait_s: for so long a client whose exchange ends with `wait` waits until the server closes.
    """
    loop = asyncio.get_running_loop()
    began = time.monotonic()
    with socket.socket() as connection:
        connection.setblocking(False)
        try:
            async with asyncio.timeout(MAX_CONNECT_S):
                await loop.sock_connect(connection, ("127.0.0.1", port))
        except OSError:  # TimeoutError is one, too
            return Outcome((), "refused", time.monotonic() - began)
        sender = loop.create_task(_send(connection, exchange))
        try:
            if exchange.ending in ("read", "wait", "half-close"):
                content, end = await _read(connection, exchange, sender, wait_s)
            else:
                await asyncio.wait([sender], timeout=DEAF_S)
                content, end = b"", "open"
        finally:
            sender.cancel()
            with suppress(asyncio.CancelledError):
                await sender
        if exchange.ending == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    answers, rest = parse_answers(content, b"HEAD" in exchange.content)
    return Outcome(tuple(answers), end, time.monotonic() - began, rest)


async def _send(connection: socket.socket, exchange: Exchange) -> None:
    loop = asyncio.get_running_loop()
    with suppress(OSError):  # the server has closed; reading says how
        for piece in exchange.pieces:
            await loop.sock_sendall(connection, piece)
            if exchange.pause_s:
                await asyncio.sleep(exchange.pause_s)
        if exchange.ending == "half-close":
            connection.shutdown(socket.SHUT_WR)


async def _read(
    connection: socket.socket, exchange: Exchange, sender: asyncio.Task[None], wait_s: float
) -> tuple[bytes, str]:
    """Read until the server closes, or for as long as the client has patience; return what came, and how it ended."""
    loop = asyncio.get_running_loop()
    content = bytearray()
    receiving: asyncio.Task[bytes] | None = None
    last, was_sending = loop.time(), True  # when a byte came last, or the last one went
    while True:
        if was_sending and sender.done():
            last, was_sending = loop.time(), False
        if exchange.ending == "wait":
            patience_s = wait_s
        else:
            is_due = _count_heads(content) < len(exchange.expected)
            is_slow = exchange.kind in ("bomb", "large") and not content
            patience_s = ANSWER_S if was_sending or is_due or is_slow else QUIET_S
        if receiving is None:
            receiving = loop.create_task(loop.sock_recv(connection, 2**18))
        await asyncio.wait([receiving], timeout=QUIET_S / 4)  # cancelled, it might lose what has come meanwhile
        if not receiving.done():
            if loop.time() - last > patience_s:
                receiving.cancel()
                with suppress(asyncio.CancelledError):
                    await receiving
                return bytes(content), "open"
            continue
        try:
            part, receiving = receiving.result(), None
        except OSError:
            return bytes(content), "reset"
        if not part:
            return bytes(content), "closed"
        content += part
        last = loop.time()


def _count_heads(content: bytearray) -> int:
    return content.count(b"HTTP/1.1 ") - content.count(b"HTTP/1.1 100 ")


def judge(exchange: Exchange, outcome: Outcome) -> str:
    """Say what a server did wrong in an exchange, or nothing."""
    statuses = outcome.statuses
    if bad := [status for status in statuses if status in (500, 502, 504) or not 200 <= status < 600]:
        return f"status {bad[0]}"
    if outcome.end == "refused":
        return "connection refused"
    if any(answer.is_last for answer in outcome.answers[:-1]):
        return "an answer after the last one"
    if exchange.ending not in ("read", "wait"):
        return ""
    if outcome.rest:
        return "half an answer" if outcome.rest.startswith(b"HTTP/1.1 ") else "no HTTP in the answer"
    if outcome.late_s > LATE_S:
        return ""
    for place, status in enumerate(exchange.expected):
        if place >= len(statuses):
            return f"answer {place + 1} of {len(exchange.expected)} expected ones lost; {outcome.end}"
        if status != ANYTHING and statuses[place] not in (status, *BUSY):
            return f"answer {place + 1} is {statuses[place]} instead of {status}"
    if outcome.end == "reset" and not (outcome.answers and outcome.answers[-1].is_last):
        return "reset without a last answer"
    if exchange.ending == "wait":
        return "never closed" if outcome.end == "open" else ""
    if outcome.end == "closed" and not statuses and exchange.content.strip(b"\r\n"):
        return "closed without an answer"
    return ""


class Campaign:
    """Many exchanges with one server, at a steady rate.

    Args:
        wait_s: longest time from a client's last byte until the server has closed the connection.
        note: is told of each exchange and its outcome.

    Attributes:
        running: the exchanges that are going on, by number.
    """

    def __init__(
        self, port: int, grammar: Grammar, wait_s: float, note: Callable[[Exchange, Outcome], None], at_once: int = 200
    ) -> None:
        self.running: dict[int, Exchange] = {}
        self._port = port
        self._grammar = grammar
        self._wait_s = wait_s
        self._note = note
        self._room = asyncio.Semaphore(at_once)
        self._tasks: set[asyncio.Task[None]] = set()
        self._late_s, self._due = 0.0, math.inf

    async def run(self, numbers: Iterable[int], rate: float) -> None:
        """Begin so many exchanges a second, but no more at once than there is room for; return when all have ended."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        beating = loop.create_task(self._beat())
        for number in numbers:
            due = max(due + 1 / rate, loop.time() - 1)
            await asyncio.sleep(max(0, due - loop.time()))
            exchange = self._grammar.build(number)
            is_long = exchange.ending == "wait"
            if not is_long:
                await self._room.acquire()
            self.running[number] = exchange
            task = loop.create_task(self._play(exchange, is_long))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        while self._tasks:
            await asyncio.wait(self._tasks)
        beating.cancel()

    async def _beat(self) -> None:
        """Add up for how long this event loop, with all its clients, comes too late."""
        while True:
            self._due = time.monotonic() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self._late_s = self._count_late()

    def _count_late(self) -> float:
        return self._late_s + max(0.0, time.monotonic() - self._due)

    async def _play(self, exchange: Exchange, is_long: bool) -> None:
        late_s = self._count_late()
        try:
            outcome = await play(self._port, exchange, self._wait_s)
        finally:
            del self.running[exchange.number]
            if not is_long:
                self._room.release()
        self._note(exchange, replace(outcome, late_s=self._count_late() - late_s))
