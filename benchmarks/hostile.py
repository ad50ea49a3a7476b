"""A server under a hundred thousand hostile exchanges, while clients that mean well go on asking.

    python -m benchmarks.hostile [--exchanges 100000] [--seed 0] [--minutes 60]
    python -m benchmarks.hostile --repeat NUMBER [NUMBER ...]

The exchanges are those of tests/hostile.py: each follows from the seed and its number. Beside them go streams of
pipelined requests that are compared with what h11 and nginx make of them (tests/smuggling.py); the latter needs nginx,
which Debian has as a package. Every exchange that goes wrong is written to a folder. The attack runs at the lowest
priority, for attackers bring machines of their own. A client that comes too late for it is not judged by whether it was
cut off; the result says how many these are. Writes benchmarks/results/hostile.json, and its paragraph in
docs/serving.md.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any

from benchmarks.honest import read_run_delay
from benchmarks.measure import PROJECT, load_result, save_result, write_table
from tests.hostile import Exchange, Grammar
from tests.hostile_bodies import build_all_bombs
from tests.hostile_clients import LATE_S, Campaign, Outcome, judge, play
from tests.serving import Running, serving, write_model
from tests.smuggling import Comparison, compare_streams

KEY = "hostile"
SAMPLE_S = 0.5
WARM_UP_S = 5.0
MAX_MEMORY_MB = 300.0
MAX_RATIO = 3.0
MAX_REMARKS = 50
TIMEOUTS_S = {"header_timeout_s": 3, "body_timeout_s": 5, "keep_alive_s": 5}
"""Shorter than they are unless set, so that a campaign sees many of them pass."""

WAIT_S = 35.0
"""Longer than all of them, one after another, with the time for an answer and for closing."""

DOCUMENT = PROJECT / "docs" / "serving.md"


def main() -> int:
    """Run the campaign, write the result, and return 1 if something was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--exchanges", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="other exchanges")
    parser.add_argument("--minutes", type=float, default=60, help="begin no exchange after so long")
    parser.add_argument("--rate", type=float, default=150, help="exchanges that begin in a second, at most")
    parser.add_argument("--before_s", type=float, default=30, help="for so long only clients that mean well ask")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="only these, such as body; the rate is theirs alone")
    parser.add_argument("--streams", type=int, default=5000, help="that are compared with h11 and nginx; 0 for none")
    parser.add_argument("--model", type=Path, help="published folder or ONNX file; by default a small network")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="folder that is made for findings")
    parser.add_argument("--output", type=Path, help="JSON file to write instead of benchmarks/results/hostile.json")
    parser.add_argument("--repeat", type=int, nargs="+", metavar="NUMBER", help="have these exchanges again, and say")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = arguments.model or write_model(folder / "model.onnx")
        with serve(model, folder) as server:
            if arguments.repeat:
                return asyncio.run(repeat(server, Grammar(arguments.seed, KEY), arguments.repeat))
            result = asyncio.run(attack(server, model, arguments))
        log = server.log.read_text(errors="replace")
    result["tracebacks"] = log.count("Traceback") + log.count("unexpected error")
    result["seed"] = arguments.seed
    result["violations"] = find_violations(result)
    if arguments.output is None:
        save_result("hostile", result)
        write_table(DOCUMENT, "hostile", build_table(load_result("hostile")))
    else:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "memory_mb"}, indent=2))
    return 1 if result["violations"] else 0


@contextmanager
def serve(model: Path, folder: Path) -> Iterator[Running]:
    """Serve a model as users do, with a key and short timeouts."""
    keys = folder / "keys"
    keys.write_text(f"campaign:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    options = [word for name, value in TIMEOUTS_S.items() for word in (f"--{name}", str(value))]
    with serving(
        model, folder / "log", "--num_threads", "0", "--api_keys_file", keys, "--allowed_hosts", "*", *options
    ) as server:
        yield server


class Watch:
    """Looks at a server every half second: its memory, its log, and whether it is still the same process.

    Attributes:
        memory_mb: resident memory at each look.
        remarks: what was seen that should not be, with the numbers of the exchanges of that time.
    """

    def __init__(self, server: Running, running: Mapping[int, Exchange]) -> None:
        self.memory_mb: list[float] = []
        self.remarks: list[dict[str, Any]] = []
        self._server = server
        self._running = running
        self._position = server.log.stat().st_size
        self._highest = server.measure_memory() + MAX_MEMORY_MB

    async def run(self) -> None:
        """Look until this is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(SAMPLE_S)

    def look(self) -> None:
        """Look once."""
        if self._server.process.poll() is not None:
            if not any(remark["what"] == "the process ended" for remark in self.remarks):
                self._note("the process ended", str(self._server.process.returncode))
            return
        self.memory_mb.append(round(self._server.measure_memory(), 1))
        if self.memory_mb[-1] > self._highest:
            self._note("memory", f"{self.memory_mb[-1]} MB")
            self._highest = self.memory_mb[-1] + 50
        with self._server.log.open("rb") as log:
            log.seek(self._position)
            text = log.read()
        self._position += len(text)
        if (found := re.search(rb"(?s)(Traceback|unexpected error).*", text)) and len(self.remarks) < MAX_REMARKS:
            self._note("traceback", found[0].decode(errors="replace")[:3000])

    def _note(self, what: str, text: str) -> None:
        self.remarks.append({"what": what, "text": text, "numbers": sorted(self._running)})


async def attack(server: Running, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Have all exchanges with a server, and measure what others get meanwhile."""
    build_all_bombs()
    await ask_honestly(server, model, WARM_UP_S)
    forget_peak(server)
    base = server.measure_memory()
    before = await ask_honestly(server, model, arguments.before_s)
    kinds: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    num_late = 0
    findings: list[dict[str, Any]] = []

    def note(exchange: Exchange, outcome: Outcome) -> None:
        nonlocal num_late
        kinds[exchange.kind] += 1
        num_late += outcome.late_s > LATE_S
        statuses.update(outcome.statuses)
        if what := judge(exchange, outcome):
            findings.append(write_finding(arguments.findings, arguments.seed, exchange, outcome, what))

    grammar = Grammar(arguments.seed, KEY)
    campaign = Campaign(server.port, grammar, WAIT_S, note)
    watch = Watch(server, campaign.running)
    watching = asyncio.create_task(watch.run())
    began, waited_s = time.monotonic(), read_run_delay(server.process.pid)
    ends = began + arguments.minutes * 60
    drawn = (number for number in count() if not arguments.kinds or grammar.get_kind(number) in arguments.kinds)
    numbers = takewhile(lambda number: time.monotonic() < ends, islice(drawn, arguments.exchanges))
    honest = await start_honest(server, model, 0)
    os.nice(19)  # who attacks has a machine of his own, which must not count as the server's slowness
    await campaign.run(numbers, arguments.rate)
    seconds = time.monotonic() - began
    waited_s = read_run_delay(server.process.pid) - waited_s
    output, _ = await honest.communicate(b"")  # the end of its standard input is its end
    watching.cancel()
    watch.look()
    left = await wait_for_rest(server)
    comparison = await compare_streams(server.port, arguments.seed, arguments.streams, KEY)
    return {
        "exchanges": sum(kinds.values()),
        "seconds": round(seconds, 1),
        "exchanges_per_second": round(sum(kinds.values()) / seconds, 1),
        "kinds": dict(sorted(kinds.items())),
        "answers": {str(status): number for status, number in sorted(statuses.items())},
        "exchanges_of_late_clients": num_late,
        "honest_before": before,
        "honest_during": json.loads(output),
        "server_waited_for_cpu_ms_per_s": round(waited_s / seconds * 1e3, 1),
        "memory_base_mb": round(base, 1),
        "memory_most_mb": max([read_peak(server), *watch.memory_mb]),
        "memory_after_mb": watch.memory_mb[-1],
        "memory_mb": watch.memory_mb[:: max(1, len(watch.memory_mb) // 120)],
        **left,
        "remarks": watch.remarks,
        "findings": [finding | {"content": finding["content"][:200]} for finding in findings],
        "streams": describe_comparison(comparison),
    }


async def start_honest(server: Running, model: Path, seconds: float) -> asyncio.subprocess.Process:
    """Start the clients that mean well, in a process of their own."""
    words = ["--port", str(server.port), "--key", KEY, "--model", str(model), "--seconds", f"{seconds:g}"]
    words += ["--server_pid", str(server.process.pid)]
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.honest", *words),
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


async def ask_honestly(server: Running, model: Path, seconds: float) -> dict[str, Any]:
    """Ask for so long, and return what the clients saw."""
    process = await start_honest(server, model, seconds)
    assert process.stdout is not None
    seen: dict[str, Any] = json.loads(await process.stdout.read())
    await process.wait()
    return seen


async def wait_for_rest(server: Running) -> dict[str, Any]:
    """Wait until a server has closed all connections but the one that asks, and say what is left."""
    ends = time.monotonic() + WAIT_S
    while True:
        found = await asyncio.to_thread(read_metrics, server.port)
        if found == {"open_connections": 1, "pending_images": 0} or time.monotonic() > ends:
            return found
        await asyncio.sleep(1)


def read_metrics(port: int) -> dict[str, float]:
    """Read how many connections are open and how many images wait; nothing where no answer comes."""
    import urllib.request

    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    names = ("open_connections", "pending_images")
    found = {name: re.search(rf"^\w+_{name}(?:{{.*}})? ([\d.e+-]+)$", text, re.MULTILINE) for name in names}
    return {name: float(match[1]) for name, match in found.items() if match}


def forget_peak(server: Running) -> None:
    """Let the kernel count a process's peak of memory from now on."""
    with suppress(OSError):  # it may not be ours to say: then the peak is that since the start
        Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")


def read_peak(server: Running) -> float:
    """Read the peak of resident memory, in MB; 0 where the process has ended."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
        return round(int(found[1]) / 1024, 1) if found else 0.0
    return 0.0


def write_finding(folder: Path, seed: int, exchange: Exchange, outcome: Outcome, what: str) -> dict[str, Any]:
    """Write an exchange that went wrong, whole, and what came of it; describe it for the result."""
    folder.mkdir(exist_ok=True)
    finding = {
        "number": exchange.number,
        "seed": seed,
        "kind": exchange.kind,
        "what": what,
        "ending": exchange.ending,
        "expected": exchange.expected,
        "statuses": outcome.statuses,
        "end": outcome.end,
        "seconds": round(outcome.seconds, 2),
        "late_s": round(outcome.late_s, 2),
        "content": repr(exchange.content[:2000]),
    }
    pieces = [base64.b64encode(piece).decode() for piece in exchange.pieces]
    whole = {**finding, "pause_s": exchange.pause_s, "pieces": pieces, "rest": repr(outcome.rest[:2000])}
    (folder / f"{seed}-{exchange.number}.json").write_text(json.dumps(whole, indent=2) + "\n")
    return finding


async def repeat(server: Running, grammar: Grammar, numbers: Sequence[int]) -> int:
    """Have some of the exchanges again, one after another, and print what came of them."""
    is_bad = False
    for number in numbers:
        exchange = grammar.build(number)
        outcome = await play(server.port, exchange, WAIT_S)
        what = judge(exchange, outcome)
        is_bad = is_bad or bool(what)
        print(
            f"{number} {exchange.kind} ({exchange.ending}): {len(exchange.content):,} bytes in {len(exchange.pieces)}"
        )
        print(f"  {exchange.content[:300]!r}")
        print(f"  expected {exchange.expected}, got {outcome.statuses}, {outcome.end} after {outcome.seconds:.2f} s")
        print(f"  memory {server.measure_memory():.0f} MB, at most {read_peak(server):.0f} MB; {what or 'good'}")
    return 1 if is_bad else 0


def describe_comparison(comparison: Comparison) -> dict[str, Any]:
    """Describe the streams for the result."""
    return {
        "number": comparison.number,
        "with_nginx": comparison.with_nginx,
        "requests_answered": comparison.answered,
        "answered_though_nginx_refuses": len(comparison.refused_by_nginx),
        "differences": [
            {"name": found.name, "with": found.peer, "what": found.what, "content": repr(found.content[:500])}
            for found in comparison.differences
        ],
    }


def find_violations(result: Mapping[str, Any]) -> list[str]:
    """Find what a server must not do, in a result."""
    before, during = result["honest_before"], result["honest_during"]
    more = result["memory_most_mb"] - result["memory_base_mb"]
    found = [
        *(f"{number} exchanges: {what}" for what, number in count_findings(result).items()),
        *(f"{remark['what']}: {remark['text']}" for remark in result["remarks"] if remark["what"] != "traceback"),
    ]
    if result["tracebacks"]:
        found.append(f"{result['tracebacks']} tracebacks in the log")
    if more > MAX_MEMORY_MB:
        found.append(f"{more:.0f} MB of memory more than before")
    if during["wrong"]:
        found.append(f"honest clients got {during['wrong']}")
    if during.get("p99_ms", float("inf")) > MAX_RATIO * before["p99_ms"]:
        found.append(f"p99 of honest clients {during.get('p99_ms')} ms, before {before['p99_ms']} ms")
    if (result.get("open_connections"), result.get("pending_images")) != (1, 0):
        found.append(f"left: {result.get('open_connections')} connections, {result.get('pending_images')} images")
    if differences := result["streams"]["differences"]:
        found.append(f"{len(differences)} streams are parsed in another way")
    return found


def count_findings(result: Mapping[str, Any]) -> dict[str, int]:
    """Count the exchanges that went wrong, by what was wrong and the rule that they come from."""
    counts = Counter(f"{finding['kind']}: {finding['what']}" for finding in result["findings"])
    return dict(sorted(counts.items()))


def build_table(result: Mapping[str, Any]) -> str:
    """Build the paragraph of docs/serving.md."""
    before, during = result["honest_before"], result["honest_during"]
    less = during.get("p99_less_waiting_for_cpu_ms")
    waited = "" if less is None else f" Less what server and clients waited for a processor, it was {less:.1f} ms."
    statuses = ", ".join(f"{status}: {number:,}" for status, number in result["answers"].items())
    streams = result["streams"]
    beside = "h11 and nginx" if streams["with_nginx"] else "h11"
    violations = "; ".join(result["violations"]) or "none"
    return (
        f"`python -m benchmarks.hostile`: {result['exchanges']:,} hostile exchanges (seed {result['seed']}) in "
        f"{result['seconds'] / 60:.0f} minutes, by status {statuses}. Memory {result['memory_base_mb']:.0f} MB "
        f"before, {result['memory_most_mb']:.0f} MB at most, {result['memory_after_mb']:.0f} MB after. Honest clients, "
        f"50 requests a second: p99 {before['p99_ms']:.1f} ms before, {during['p99_ms']:.1f} ms during the attack."
        f"{waited} They got {during['answered']:,} correct answers and {sum(during['wrong'].values())} wrong ones. "
        f"{streams['number']:,} streams of pipelined requests compared with {beside}: "
        f"{len(streams['differences'])} parsed differently. Violations at commit "
        f"{result['commit'][:12]}: {violations}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
