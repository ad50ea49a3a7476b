"""Clients that mean well: they ask at a fixed rate, whatever the answers take, and measure how long these take.

    python -m benchmarks.honest --port PORT --key KEY --model MODEL --server_pid PID --seconds 20

Three of four requests come on connections that stay, the fourth on one of its own; three of four are raw pixels, the
fourth a PNG. A request's time counts from when it was due (an open loop). Ends after so many seconds, or with
`--seconds 0` when the standard input ends, and prints what it saw as JSON. That tells, too, how long the clients and
the server's event loop were ready to run and had no processor: on a busy machine, that part is not the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.serving import encode_png
from image_classifier.published.predictor import load_predictor
from tests.serving import draw_images

TIMEOUT_S = 30.0
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Clients:
    """The clients together.

    Attributes:
        times_s: from when a request was due until its answer was there, of those that were answered rightly.
        wrong: what else came, and how often.
        waits_s: of each of `times_s`, what the clients and the server's loop waited for a processor meanwhile.
    """

    def __init__(self, port: int, key: str, model: Path, server_pid: int) -> None:
        self.times_s: list[float] = []
        self.waits_s: list[float] = []
        self._pids = (os.getpid(), server_pid)
        self.wrong: Counter[str] = Counter()
        self._port = port
        self._idle: deque[Stream] = deque()
        images = draw_images(16, seed=1)
        predictor = load_predictor(model)
        best = predictor.predict(images).argmax(axis=1)
        self._classes = [predictor.model.classes[index] for index in best]
        self._requests = []
        for place, image in enumerate(images):
            kind, body = "application/octet-stream", image.tobytes()
            if place % 4 == 3:
                kind, body = "image/png", encode_png(body)
            head = (
                f"POST /predict HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\nContent-Type: {kind}\r\n"
            )
            self._requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    async def run(self, rate: float, seconds: float) -> None:
        """Ask at a rate until it is time to end."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        if seconds:
            loop.call_later(seconds, ended.set_result, None)
        else:
            loop.add_reader(sys.stdin, _end, ended)
        began, number, tasks = loop.time(), 0, set()
        while not ended.done():
            number += 1
            due, waited_s = began + number / rate, self._count_waiting()
            await asyncio.wait([ended], timeout=max(0, due - loop.time()))
            task = loop.create_task(self._ask(number, due, waited_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    def _count_waiting(self) -> float:
        return sum(map(read_run_delay, self._pids))

    async def _ask(self, number: int, due: float, waited_s: float) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status, document = await self._exchange(number)
        except (OSError, EOFError, ValueError) as error:
            self.wrong[f"{type(error).__name__}: {error}"[:100]] += 1
            return
        if status != 200:
            self.wrong[f"status {status}"] += 1
        elif document["predictions"][0]["class"] != self._classes[number % len(self._classes)]:
            self.wrong["another class"] += 1
        else:
            self.times_s.append(asyncio.get_running_loop().time() - due)
            self.waits_s.append(self._count_waiting() - waited_s)

    async def _exchange(self, number: int) -> tuple[int, Any]:
        is_fresh = number % 4 == 0 or not self._idle
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port) if is_fresh else self._idle.popleft()
        try:
            writer.write(self._requests[number % len(self._requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            document = json.loads(await reader.readexactly(int(fields[b"content-length"])))
        except BaseException:
            writer.close()
            raise
        if number % 4 and fields.get(b"connection") != b"close":
            self._idle.append((reader, writer))
        else:
            writer.close()
        return int(head.split()[1]), document

    def describe(self) -> dict[str, Any]:
        """Describe what the clients saw."""
        times = sorted(self.times_s)
        shares = {f"p{share}_ms": times[min(len(times) - 1, len(times) * share // 100)] * 1e3 for share in (50, 95, 99)}
        facts = {**shares, "mean_ms": statistics.fmean(times) * 1e3, "most_ms": times[-1] * 1e3} if times else {}
        if times:
            left = sorted(time_s - wait_s for time_s, wait_s in zip(self.times_s, self.waits_s, strict=True))
            facts["p99_less_waiting_for_cpu_ms"] = left[len(left) * 99 // 100] * 1e3
        rounded = {name: round(value, 2) for name, value in facts.items()}
        return {"answered": len(times), **rounded, "wrong": dict(self.wrong)}


def read_run_delay(pid: int) -> float:
    """Read for how many seconds a process's first thread has been ready to run and had no processor.

    Returns:
        0.0 where the process has ended, or the kernel does not say.
    """
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def _end(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


def main() -> None:
    """Ask, and print what was seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--server_pid", type=int, required=True)
    parser.add_argument("--rate", type=float, default=50, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    clients = Clients(arguments.port, arguments.key, arguments.model, arguments.server_pid)
    asyncio.run(clients.run(arguments.rate, arguments.seconds))
    print(json.dumps(clients.describe()))


if __name__ == "__main__":
    main()
