"""What it costs a server to capture all requests and to show drift, and what is lost when it is killed meanwhile.

    python -m benchmarks.capture --run EXPERIMENTS/benchmark/notebook --run EXPERIMENTS/benchmark/fast

Each run must be published, with its drift reference (`publish --overwrite` adds it to one of an earlier version). Needs
wrk. Servers with capture, with drift gauges, with both and with none take turns; ratios compare those of one turn. Then
servers of the first run that capture are killed with SIGKILL under load, at random moments. An answer that a
client had got and that no file holds is lost. Writes benchmarks/results/capture.json and the table in docs/capture.md
that comes from it; `--only tables` writes this alone.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, load_result, save_result, write_table
from benchmarks.serving import KEY, RAW, list_processes, load_images, load_with_wrk, read_counts, serving
from image_classifier.capture import writer as module
from image_classifier.capture.files import read_captures
from image_classifier.tracking.reading import read_record

CONNECTIONS = (8, 32)
PATH = "/predict"
FLUSH_S = 2.0
"""Of all servers that capture."""

SIDES = {"none": (False, False), "capture": (True, False), "gauges": (False, True), "both": (True, True)}
"""What the servers do beside answering: capture all requests, and show drift gauges."""

DRIFT_WINDOW = 1000
LIFE_S = (0.2, 6.0)
NUM_CLIENTS = 8
DOCUMENT = PROJECT / "docs" / "capture.md"
FIGURES = ("requests_per_second", "p50_ms", "p99_ms")


def build_options(folder: Path, flush_s: float) -> list[str]:
    """Build the options of a server that captures everything."""
    return ["--capture", str(folder), "--capture_fraction", "1", "--capture_flush_s", str(flush_s)]


def read_cpu_seconds(leader: int) -> dict[str, float]:
    """Read the processor seconds so far of a server, and of the process that writes its captures."""
    seconds = dict.fromkeys(("server", "writer"), 0.0)
    for pid in list_processes(leader):
        is_writer = module.__name__.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        seconds["writer" if is_writer else "server"] += ticks / os.sysconf("SC_CLK_TCK")
    return seconds


def measure_side(run: Path, pixels: bytes, seconds: int, options: Sequence[str]) -> dict[str, Any]:
    """Measure one server at each number of connections, and the processor time of an image."""
    with serving("own", run, *options) as (process, port):
        load_with_wrk(port, PATH, RAW, pixels, 4, seconds)
        before = read_cpu_seconds(process.pid)
        points = {str(number): load_with_wrk(port, PATH, RAW, pixels, number, seconds) for number in CONNECTIONS}
        time.sleep(FLUSH_S)  # in which the last file is written
        num_images = seconds * sum(point["requests_per_second"] for point in points.values())
        after = read_cpu_seconds(process.pid)
        cpu_us = {part: 1e6 * (after[part] - before[part]) / num_images for part in after}
        return {"points": points, "captured": read_counts(port, "captured_images"), "cpu_us": cpu_us}


def measure_run(run: Path, seconds: int, rounds: int) -> dict[str, Any]:
    """Measure a run's servers in turns: medians, and the medians of the ratios to the server without, of each turn."""
    pixels = load_images(run)[0]
    turns: list[dict[str, Any]] = []
    sides = list(SIDES)
    for _ in range(rounds):
        turn: dict[str, Any] = {}
        for side in sides:
            with tempfile.TemporaryDirectory() as folder:
                captures, watches = SIDES[side]
                options = build_options(Path(folder), FLUSH_S) if captures else []
                options += ["--drift_window", str(DRIFT_WINDOW)] if watches else []
                turn[side] = measure_side(run, pixels, seconds, options)
            print(run.name, side, turn[side], flush=True)
        turns.append(turn)
        sides.append(sides.pop(0))
    points = {
        connections: {side: summarize(turns, side, connections) for side in SIDES}
        for connections in map(str, CONNECTIONS)
    }
    counts = [Counter(turn[side]["captured"]) for turn in turns for side in SIDES]
    captured = {name: sum(count[name] for count in counts) for name in counts[0]}
    cpu_us = {
        side: {part: statistics.median(turn[side]["cpu_us"][part] for turn in turns) for part in ("server", "writer")}
        for side in SIDES
    }
    return {"recipe": read_record(run)["recipe"], "points": points, "captured": captured, "cpu_us": cpu_us}


def summarize(turns: Sequence[Mapping[str, Any]], side: str, connections: str) -> dict[str, Any]:
    """Summarize the turns of one kind of server: its medians, and those of its ratios to the one that does no more."""
    rows = [{each: turn[each]["points"][connections] for each in ("none", side)} for turn in turns]
    medians = {name: statistics.median(row[side][name] for row in rows) for name in FIGURES}
    if side == "none":
        return medians
    ratios = {name: statistics.median(row[side][name] / row["none"][name] for row in rows) for name in FIGURES}
    return {**medians, "ratio": ratios}


class Load:
    """Clients that ask one after the other, each request under a name of its own, until the server has gone.

    Attributes:
        answered: by the request's name, when its answer had come, on the clock of `time.monotonic`.
    """

    def __init__(self, port: int, pixels: bytes, num_clients: int = NUM_CLIENTS) -> None:
        self.answered: dict[str, float] = {}
        self._port, self._pixels = port, pixels
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        headers = {"Content-Type": RAW.content_type, "Authorization": f"Bearer {KEY}"}
        with suppress(OSError, http.client.HTTPException):
            for request in range(1_000_000):
                name = f"{number}-{request}"
                connection.request("POST", PATH, self._pixels, headers | {"X-Request-ID": name})
                answer = connection.getresponse()
                answer.read()
                if answer.status == 200:
                    self.answered[name] = time.monotonic()
        connection.close()

    def join(self) -> None:
        """Wait until the clients have seen that the server has gone."""
        for thread in self._threads:
            thread.join(60)


def judge_kill(folder: Path, answered: Mapping[str, float], killed_at: float) -> dict[str, Any]:
    """Judge what a killed server has left: what is lost, how long before the kill it was answered, and broken files."""
    captures = read_captures(folder)
    kept: set[str] = set()
    if folder.is_dir() and any(folder.glob("date=*/hour=*/*")):
        kept.update(name for captured in captures for name in captured.request_ids)
    lost = [at for name, at in answered.items() if name not in kept]
    return {
        "answered": len(answered),
        "lost": len(lost),
        "loss_s": max(0.0, killed_at - min(lost, default=killed_at)),
        "files": captures.num_read,
        "broken": len(captures.broken),
    }


def kill_all(leader: int) -> None:
    """Kill a process and all that descend from it, as when a container is killed."""
    for pid in reversed(list_processes(leader)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def measure_kills(run: Path, number: int, flush_s: float = FLUSH_S) -> dict[str, Any]:
    """Kill capturing servers under load, each at a random moment."""
    moments, pixels = random.Random(0), load_images(run)[0]
    kills = []
    for _ in range(number):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "captured"
            with serving("own", run, *build_options(folder, flush_s)) as (process, port):
                load = Load(port, pixels)
                time.sleep(moments.uniform(*LIFE_S))
                killed_at = time.monotonic()
                kill_all(process.pid)
                assert process.wait(20) == -signal.SIGKILL
                load.join()
            kills.append(judge_kill(folder, load.answered, killed_at))
        print(kills[-1], flush=True)
    totals = {name: sum(kill[name] for kill in kills) for name in ("answered", "lost", "files", "broken")}
    return {"kills": number, "flush_s": flush_s, **totals, "largest_loss_s": max(kill["loss_s"] for kill in kills)}


def build_table(result: Mapping[str, Any]) -> str:
    """Build the table of the document."""
    lines = ["| recipe | clients | with | requests/s | ratio | p99 ms | ratio |", "|---|---|---|---|---|---|---|"]
    for measured in result["runs"]:
        for connections, point in measured["points"].items():
            if "on" in point:  # as it was before gauges were measured
                point = {"none": point["off"], "capture": {**point["on"], "ratio": point["ratio"]}}
            for side, figures in point.items():
                cells = [f"`{measured['recipe']}`", connections, side]
                for name, spec in (("requests_per_second", ",.0f"), ("p99_ms", ".3g")):
                    cells.append(f"{figures[name]:{spec}}")
                    cells.append(f"{figures['ratio'][name]:.3f}" if "ratio" in figures else "")
                lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    shares_kept = [
        f"`{measured['recipe']}`: {counts['written']:,.0f} images written, {counts['dropped']:,.0f} dropped, "
        f"{counts['failed']:,.0f} failed"
        for measured in result["runs"]
        for counts in [measured["captured"]]
    ]
    costs = [
        f"`{measured['recipe']}`: {sides['none']['server']:.1f} us without, {sides['capture']['server']:.1f} us and "
        f"{sides['capture']['writer']:.1f} us in the writer with capture"
        for measured in result["runs"]
        if (sides := measured.get("cpu_us"))
    ]
    cost = [f"Processor time of an image: {'; '.join(costs)}.", ""] if costs else []
    kills = result["kills"]
    killed = (
        f"{kills['kills']} servers were killed under the load of {NUM_CLIENTS} clients with `--capture_flush_s "
        f"{kills['flush_s']:g}`. Of {kills['files']:,} files {kills['broken']} were broken. Of {kills['answered']:,} "
        f"answers {kills['lost']:,} were lost, the earliest {kills['largest_loss_s']:.2f} s before the kill."
    )
    origin = (
        f"Measured by `python -m benchmarks.capture` on {result['processor']}, {result['cores']} cores, commit "
        f"{result['commit'][:12]}; {result['rounds']} turns of {result['seconds']:g} s, medians."
    )
    return "\n".join([*lines, "", f"{'; '.join(shares_kept)}.", "", *cost, killed, "", origin, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the result and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="published run; may be given several times"
    )
    parser.add_argument("--seconds", type=int, default=10, help="whole seconds of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="turns of the servers")
    parser.add_argument("--kills", type=int, default=20, help="servers that are killed")
    parser.add_argument("--only", choices=["tables"])
    arguments = parser.parse_args(argv)
    if not arguments.only:
        if not arguments.run:
            parser.error("--run takes a published run")
        runs = [measure_run(run, arguments.seconds, arguments.rounds) for run in arguments.run]
        kills = measure_kills(arguments.run[0], arguments.kills)
        facts = {"seconds": arguments.seconds, "rounds": arguments.rounds, "runs": runs, "kills": kills}
        save_result("capture", facts)
    write_table(DOCUMENT, "capture", build_table(load_result("capture")))


if __name__ == "__main__":
    main()
