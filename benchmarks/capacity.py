"""How many requests a second a server on one core answers, and how many servers a given load needs.

    python -m benchmarks.capacity --run EXPERIMENTS/benchmark/notebook --run EXPERIMENTS/benchmark/fast

Each run must be published. Needs wrk and two cores: the server has one, the clients have another. More and more clients
send pixels, each of which waits for its answer (a closed loop). The server's own histogram gives the mean time of a
request, so Little's law (requests in flight = requests a second * mean time) can be checked, and not only be used.
Writes benchmarks/results/capacity.json and the tables in docs/monitoring.md that come from it; `--only tables` writes
these alone.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, format_figure, load_result, save_result, write_table
from benchmarks.serving import KEY, RAW, load_images, load_with_wrk, serving
from image_classifier.tracking.reading import read_record

CONNECTIONS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 3
DOCUMENT = PROJECT / "docs" / "monitoring.md"
GOAL_MS = 50.0
"""Of the slowest request in a hundred."""

USED_SHARE = 0.7
"""Of a server's capacity that is planned with: what is left serves bursts, and a server that is lost or replaced."""

LOADS = (100, 1_000, 10_000)
"""Requests a second."""


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Let this process, and those that it starts in the block, run on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def read_durations(port: int) -> tuple[float, float]:
    """Read from the server how many predictions it answered, and the sum of their seconds."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read().decode()
    pattern = r'duration_seconds_(count|sum)\{[^}]*http_response_status_code="200",http_route="/predict"\} ([\d.e+-]+)'
    found = dict(re.findall(pattern, text))
    return float(found["count"]), float(found["sum"])


def measure_run(
    run: Path, seconds: int, connections: Sequence[int] = CONNECTIONS, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Measure a server of a published run on one core: medians of the rounds, by number of clients."""
    server_core, *others = sorted(os.sched_getaffinity(0))
    points: dict[str, dict[str, float]] = {}
    pixels = load_images(run)[0]
    with on_core(server_core), serving("own", run) as (_, port), on_core(others[0] if others else server_core):
        load_with_wrk(port, "/predict", RAW, pixels, 4, seconds)
        for number in connections:
            found = []
            for _ in range(rounds):
                count, total = read_durations(port)
                loaded = load_with_wrk(port, "/predict", RAW, pixels, number, seconds)
                count_after, total_after = read_durations(port)
                mean_s = (total_after - total) / (count_after - count)
                found.append(loaded | {"mean_ms": mean_s * 1e3, "in_flight": loaded["requests_per_second"] * mean_s})
            points[str(number)] = {name: statistics.median(each[name] for each in found) for name in found[0]}
    return {"recipe": read_record(run)["recipe"], "points": points}


def find_best(points: Mapping[str, Mapping[str, float]], goal_ms: float = GOAL_MS) -> tuple[int, Mapping[str, float]]:
    """Find the number of clients at which most is answered while the slowest in a hundred meet the goal.

    Where none meets it, one client is the best that there is.
    """
    good = [number for number, point in points.items() if point["p99_ms"] <= goal_ms] or [min(points, key=int)]
    best = max(good, key=lambda number: points[number]["requests_per_second"])
    return int(best), points[best]


def count_servers(load: float, requests_per_second: float, used_share: float = USED_SHARE) -> int:
    """Count the servers for a load, in requests a second.

    By Little's law load * mean time are in flight, and one server holds requests_per_second * mean time of them. Their
    ratio has no time in it.
    """
    return math.ceil(load / (requests_per_second * used_share))


def build_table(result: Mapping[str, Any]) -> str:
    """Build the tables of the document."""
    lines = [
        "| recipe | clients | requests/s on one core | latency: mean, p99 ms | requests in flight, measured by the "
        "server |"
    ]
    lines.append("|---|---|---|---|---|")
    needed = ["| recipe | " + " | ".join(f"servers for {load:,}/s" for load in LOADS) + " |"]
    needed.append("|---|" + "---|" * len(LOADS))
    for measured in result["runs"]:
        number, point = find_best(measured["points"])
        rate, mean_ms = point["requests_per_second"], point["mean_ms"]
        times = f"{format_figure(mean_ms)}, {format_figure(point['p99_ms'])}"
        in_flight = format_figure(point["in_flight"])
        lines.append(f"| `{measured['recipe']}` | {number} | {rate:,.0f} | {times} | {in_flight} |")
        servers = [f"{count_servers(load, rate):,} ({format_figure(load * mean_ms / 1e3)} in flight)" for load in LOADS]
        needed.append(f"| `{measured['recipe']}` | {' | '.join(servers)} |")
    origin = (
        f"Measured by `python -m benchmarks.capacity` on {result['processor']}, one core for the server and another "
        f"for the clients, commit {result['commit'][:12]}; {result['rounds']} rounds of {result['seconds']} s, "
        f"medians. Clients: the number with the highest throughput at a p99 of at most {GOAL_MS:g} ms."
    )
    return "\n".join([*lines, "", *needed, "", origin, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the result and the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="published run; may be given several times"
    )
    parser.add_argument("--seconds", type=int, default=5, help="whole seconds of each measurement")
    parser.add_argument("--only", choices=["tables"])
    arguments = parser.parse_args(argv)
    if not arguments.only:
        if not arguments.run:
            parser.error("--run takes a published run")
        runs = [measure_run(run, arguments.seconds) for run in arguments.run]
        save_result("capacity", {"seconds": arguments.seconds, "rounds": ROUNDS, "runs": runs})
    write_table(DOCUMENT, "capacity", build_table(load_result("capacity")))


if __name__ == "__main__":
    main()
