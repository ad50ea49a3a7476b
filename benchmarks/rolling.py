"""Servers that replace each other under load, as the pods of a Deployment do, and the requests that this loses.

    python -m benchmarks.rolling --run EXPERIMENTS/benchmark/notebook

The run must be published. Clients connect to whichever server is named at that moment, as a Service of Kubernetes has
them do, and keep their connections. For each replacement a new server starts; once it is ready, new connections go to
it, and the old server gets SIGTERM, drains and must end with 0. A request is lost that gets no whole answer, or another
one than 200. Nothing is timed. Writes benchmarks/results/rolling.json and the sentence in docs/kubernetes.md that comes
from it; `--only tables` writes this alone.
"""

from __future__ import annotations

import argparse
import http.client
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, load_result, save_result, write_table
from benchmarks.serving import KEY, RAW, load_images, serving

NUM_CLIENTS = 16
BETWEEN_S = 0.5
"""Between a new server's first requests and SIGTERM to the old one: what `preStop` is for."""

DRAIN_S = 1.0
DOCUMENT = PROJECT / "docs" / "kubernetes.md"


class Clients:
    """Clients that ask one after the other on connections that they keep.

    Attributes:
        port: of the server to which new connections go.
        answered: how many requests, by the port of the server that answered.
        lost: what went wrong with the others.
    """

    def __init__(self, port: int, pixels: bytes, number: int = NUM_CLIENTS) -> None:
        self.port = port
        self.answered: Counter[int] = Counter()
        self.lost: list[str] = []
        self._pixels = pixels
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Content-Type": RAW.content_type, "Authorization": f"Bearer {KEY}"}
        while not self._is_over.is_set():
            if connection.sock is None:  # the first one, or one that an answer has closed
                connection.port = self.port
            port = connection.port
            try:
                connection.request("POST", "/predict", self._pixels, headers)
                answer = connection.getresponse()
                answer.read()
                problem = "" if answer.status == 200 else f"status {answer.status}"
            except (OSError, http.client.HTTPException) as error:
                problem = repr(error)
                connection.close()
            with self._lock:
                if problem:
                    self.lost.append(problem)
                else:
                    self.answered[port] += 1
        connection.close()

    def wait_for_answers(self, port: int, number: int = NUM_CLIENTS) -> None:
        """Wait until a server has answered so many requests."""
        deadline = time.monotonic() + 60
        while self.answered[port] < number:
            assert time.monotonic() < deadline, f"the server at port {port} gets no requests"
            time.sleep(0.01)

    def stop(self) -> None:
        """Let all end after their next answer."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)


def roll(run: Path, pixels: bytes, number: int) -> dict[str, Any]:
    """Replace a server so often, and count what its clients got."""
    with ExitStack() as servers:
        old, port = servers.enter_context(serving("own", run, "--drain_s", f"{DRAIN_S:g}"))
        clients = Clients(port, pixels)
        servers.callback(clients.stop)
        clients.wait_for_answers(port)
        statuses: list[int] = []
        for replacement in range(1, number + 1):
            new, port = servers.enter_context(serving("own", run, "--drain_s", f"{DRAIN_S:g}"))
            clients.port = port
            time.sleep(BETWEEN_S)
            old.terminate()
            statuses.append(old.wait(60))
            clients.wait_for_answers(port)
            print(f"{replacement}: {clients.answered.total():,} answered, {len(clients.lost)} lost", flush=True)
            old = new
        clients.stop()
    return {
        "replacements": number,
        "clients": NUM_CLIENTS,
        "answered": clients.answered.total(),
        "fewest_answered_by_a_server": min(clients.answered.values()),
        "lost": len(clients.lost),
        "reasons": dict(Counter(clients.lost)),
        "exit_statuses": statuses,
    }


def build_table(result: Mapping[str, Any]) -> str:
    """Build what the document says."""
    is_well = not any(result["exit_statuses"])
    ends = "every server ended with status 0" if is_well else f"servers ended with {result['exit_statuses']}"
    return (
        f"In {result['replacements']} rolling replacements under the load of {result['clients']} clients, "
        f"{result['answered']:,} requests were answered and {result['lost']} lost; {ends} "
        f"(`python -m benchmarks.rolling`, commit {result['commit'][:12]}).\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Replace servers, and write the result and the sentence."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="published run")
    parser.add_argument("--replacements", type=int, default=20)
    parser.add_argument("--only", choices=["tables"])
    arguments = parser.parse_args(argv)
    if not arguments.only:
        if not arguments.run:
            parser.error("--run takes a published run")
        save_result("rolling", roll(arguments.run, load_images(arguments.run)[0], arguments.replacements))
    write_table(DOCUMENT, "rolling", build_table(load_result("rolling")))


if __name__ == "__main__":
    main()
