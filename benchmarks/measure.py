"""What all benchmarks share: whole commands measured from outside, and results that say where they come from."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "benchmarks" / "results"


@dataclass(frozen=True)
class Measurement:
    """One command, measured by the operating system when it ended."""

    seconds: float
    cpu_seconds: float
    peak_memory_mb: float


def measure_command(command: Sequence[str | Path], **environment: str) -> Measurement:
    """Run a command to its end and measure it; its output goes to a file that is shown if it fails."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=output,
            stderr=output,
            cwd=PROJECT,
            env={**os.environ, **environment},
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            sys.exit(f"{' '.join(map(str, command))}\nexit status {process.returncode}\n{output.read().decode()}")
    return Measurement(round(seconds, 3), round(usage.ru_utime + usage.ru_stime, 3), round(usage.ru_maxrss / 1024, 1))


def describe_origin() -> dict[str, Any]:
    """Describe when, on what machine and from which code a result comes."""
    commit = subprocess.run(["git", "-C", PROJECT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def save_result(name: str, result: dict[str, Any]) -> None:
    """Write benchmarks/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**describe_origin(), **result}, indent=2) + "\n")


def load_result(name: str) -> dict[str, Any]:
    """Read an earlier result, or nothing."""
    path = RESULTS / f"{name}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return result


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Compute mean, spread and range."""
    return {
        "mean": statistics.fmean(values),
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
        "least": min(values),
        "most": max(values),
        "runs": len(values),
    }


def to_row(measurement: Measurement) -> dict[str, float]:
    """Turn a measurement into JSON."""
    return asdict(measurement)
