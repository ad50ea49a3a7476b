"""What `make load-test` reports on this machine: Locust's mix of requests against a server of each network.

    python -m benchmarks.load_test --run EXPERIMENTS/benchmark/notebook --run EXPERIMENTS/benchmark/fast

Each run must be published. Users and time are those of load_test/locust.conf. Any answer that is not as it should be
ends the script. Writes benchmarks/results/load_test.json from Locust's CSV, and the table in docs/monitoring.md that
comes from it; `--only tables` writes this alone.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, format_figure, load_result, save_result, write_table
from image_classifier.tracking.reading import read_record

DOCUMENT = PROJECT / "docs" / "monitoring.md"
COLUMNS = {
    "requests": "Request Count",
    "failed": "Failure Count",
    "requests_per_second": "Requests/s",
    "p50_ms": "50%",
    "p95_ms": "95%",
    "p99_ms": "99%",
}
"""Of Locust's CSV, by the name in the result."""

ALL = "Aggregated"


def measure_run(run: Path, users: int, seconds: int) -> dict[str, Any]:
    """Load a server of a published run: Locust's figures by the kind of request."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "load_test", "--model", str((run / "published").absolute())]
        words += ["--csv", f"{folder}/load", "--html", f"{folder}/report.html"]
        words += ["--users", str(users), "--spawn-rate", str(users), "--run-time", f"{seconds}s"]
        subprocess.run(words, cwd=PROJECT, check=True)
        return {"recipe": read_record(run)["recipe"], "kinds": read_kinds(Path(folder) / "load_stats.csv")}


def read_kinds(path: Path) -> dict[str, dict[str, float]]:
    """Read Locust's figures from its CSV, by the kind of request."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {row["Name"]: {key: float(row[column]) for key, column in COLUMNS.items()} for row in rows}


def build_table(result: Mapping[str, Any]) -> str:
    """Build the table of the document."""
    lines = ["| recipe | request | requests/s | p50, p95, p99 ms | failed |", "|---|---|---|---|---|"]
    for measured in result["runs"]:
        for name, kind in measured["kinds"].items():
            times = ", ".join(format_figure(kind[key]) for key in ("p50_ms", "p95_ms", "p99_ms"))
            title, rate = "all" if name == ALL else name, format_figure(kind["requests_per_second"])
            lines.append(f"| `{measured['recipe']}` | {title} | {rate} | {times} | {kind['failed']:.0f} |")
    origin = (
        f"Measured by `python -m benchmarks.load_test` on {result['processor']}, {result['cores']} cores, commit "
        f"{result['commit'][:12]}; {result['users']} users, {result['seconds']} s."
    )
    return "\n".join([*lines, "", origin, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Load servers, and write the result and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="published run; may be given several times"
    )
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--only", choices=["tables"])
    arguments = parser.parse_args(argv)
    if not arguments.only:
        if not arguments.run:
            parser.error("--run takes a published run")
        facts = {"users": arguments.users, "seconds": arguments.seconds}
        runs = [measure_run(run, **facts) for run in arguments.run]
        save_result("load_test", {**facts, "runs": runs})
    write_table(DOCUMENT, "load_test", build_table(load_result("load_test")))


if __name__ == "__main__":
    main()
