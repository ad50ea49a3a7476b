"""An hour at 70 % of the load that the server can take: its memory stays flat, and no request fails.

    python -m benchmarks.soak --run EXPERIMENTS/benchmark/fast

Needs wrk and hey. First finds the rate that the server can take; then hey asks at 70 % of it with a fixed rate (an
open loop), and now and then an image file, a broken one, and a client that leaves. Writes benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.measure import save_result
from benchmarks.serving import KEY, RAW, encode, load_images, load_with_wrk, serving

CLIENTS = 32
LOAD = 0.7
SAMPLE_S = 5.0


def read_memory(pid: int) -> float:
    """Read the resident memory of a process, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


def read_answers(port: int) -> dict[str, int]:
    """Read the server's own count of the answers of /predict, by status."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read().decode()
    pattern = r'duration_seconds_count\{.*http_response_status_code="(\d+)",http_route="/predict"\} ([\d.e+]+)'
    return {status: int(float(count)) for status, count in re.findall(pattern, text)}


def disturb(port: int, pixels: bytes) -> int:
    """Send a good image file, a broken one, and leave before a third answer; return the status of the good one."""
    statuses = []
    for content in (encode(pixels, "PNG"), encode(pixels, "PNG")[:500]):
        headers = {"Content-Type": "image/png", "Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", data=content, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                statuses.append(int(answer.status))
        except urllib.error.HTTPError as error:
            statuses.append(error.code)
            error.close()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 3072\r\n\r\nabc")
    if statuses[1] != 422:
        sys.exit(f"a broken image was answered with {statuses[1]}")
    return statuses[0]


def soak(run: Path, seconds: float) -> dict[str, Any]:
    """Load a server for so long and watch it."""
    pixels = load_images(run)[0]
    with serving("own", run) as (process, port), tempfile.TemporaryDirectory() as scratch:
        capacity = load_with_wrk(port, "/predict", RAW, pixels, CLIENTS, 10)["requests_per_second"]
        rate = LOAD * capacity / CLIENTS
        (Path(scratch) / "body").write_bytes(pixels)
        words = [
            "hey",
            "-z",
            f"{seconds:g}s",
            "-c",
            str(CLIENTS),
            "-q",
            f"{rate:.3f}",
            "-m",
            "POST",
            "-T",
            RAW.content_type,
        ]
        words += ["-H", f"Authorization: Bearer {KEY}", "-D", f"{scratch}/body", f"http://127.0.0.1:{port}/predict"]
        memory, disturbed = [], []
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as hey:
            while True:
                try:
                    output, _ = hey.communicate(timeout=SAMPLE_S)
                    break
                except subprocess.TimeoutExpired:
                    memory.append(round(read_memory(process.pid), 1))
                    disturbed.append(disturb(port, pixels))
        answered = read_answers(port)
    statuses = {status: int(number) for status, number in re.findall(r"\[(\d+)\]\s+(\d+) responses", output)}
    percentiles = {
        f"p{share}_ms": float(value) * 1e3 for share, value in re.findall(r"(\d+)% in ([\d.]+) secs", output)
    }
    half = len(memory) // 2
    return {
        "network": run.name,
        "seconds": seconds,
        "capacity_per_second": capacity,
        "asked_per_second": round(rate * CLIENTS, 1),
        "statuses_of_first_million": statuses,  # hey keeps no more
        "answered_predictions": answered,
        "errors": re.findall(r"(?s)Error distribution:(.*)", output),
        **percentiles,
        "disturbances": len(disturbed),
        "image_files_answered_with_200": sum(status == 200 for status in disturbed),
        "memory_mb_first_half": round(statistics.fmean(memory[:half] or memory), 1),
        "memory_mb_second_half": round(statistics.fmean(memory[half:]), 1),
        "memory_mb_most": max(memory),
        "memory_mb": memory[:: max(1, len(memory) // 120)],
    }


def main() -> None:
    """Soak, and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a published run")
    parser.add_argument("--seconds", type=float, default=3600)
    arguments = parser.parse_args()
    if shutil.which("hey") is None:
        sys.exit("this needs hey, which Debian has as a package")
    save_result("soak", soak(arguments.run.resolve(), arguments.seconds))


if __name__ == "__main__":
    main()
