"""All of CIFAR-10 into and out of SQLite and PostgreSQL: images a second, and the most memory.

    python -m benchmarks.database --dataset_folder DATA [--runs 3]

Starts a PostgreSQL of its own (Debian: postgresql), reached over loopback. Each step is a process of its own, whose
seconds are counted from the call, as its imports are those of any command. Writes benchmarks/results/database.json and
the table in docs/database.md that comes from it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, load_result, measure_command, save_result, summarize, write_table
from tests.postgres import PASSWORD, Cluster

DOCUMENT = PROJECT / "docs" / "database.md"
STEPS = {
    "ingest": "`data ingest`, including the new version",
    "snapshot": "`data snapshot` of a version",
    "found_again": "finding an existing snapshot",
}
DRIVERS = {"sqlite": "SQLite", "postgresql": "PostgreSQL over loopback"}

WORK = """
import json, sys, time
from pathlib import Path
from image_classifier.access import DatabaseAccess
from image_classifier.credentials import resolve_password
from image_classifier.data.database import load_version_snapshot
from image_classifier.data.ingest import ingest
from image_classifier.references import Reference
step, source, config, folder = sys.argv[1], *map(Path, sys.argv[2:])
access = DatabaseAccess(config=config, password=resolve_password(None), dataset_folder=folder)
started = time.perf_counter()
if step == "ingest":
    version = ingest(source, "cifar10", access).version
    digest, images = version.digest, version.num_train + version.num_test
else:
    snapshot = load_version_snapshot(Reference("cifar10", 1), access)
    digest, images = snapshot.digest, len(snapshot.labels)
print(json.dumps({"seconds": time.perf_counter() - started, "digest": digest, "images": images}))
"""


def measure_step(step: str, source: Path, config: Path, folder: Path) -> dict[str, Any]:
    """Measure one step in a process of its own."""
    command: list[str | Path] = [sys.executable, "-c", WORK, step, source, config, folder]
    measurement = measure_command(command, DB_PASSWORD=PASSWORD)
    facts: dict[str, Any] = json.loads(measurement.last_line)
    rate = facts["images"] / facts["seconds"]
    return {**facts, "images_per_second": rate, "peak_memory_mb": measurement.peak_memory_mb}


def measure_driver(driver: str, cluster: Cluster, source: Path, scratch: Path) -> dict[str, dict[str, Any]]:
    """Measure each step on an empty database; the snapshots go where there are none."""
    home, elsewhere = scratch / "home", scratch / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    config = scratch / "db_connect.yaml"
    if driver == "sqlite":
        config.write_text(f"driver: sqlite\ndatabase: {home / 'database.sqlite'}\n")
    else:
        name = f"benchmark_{os.getpid()}_{scratch.name.replace('-', '_')}".lower()
        cluster.execute("postgres", f"CREATE DATABASE {name}")
        cluster.write_config(config, name)
    return {step: measure_step(step, source, config, home if step == "ingest" else elsewhere) for step in STEPS}


def build_table(result: dict[str, Any]) -> str:
    """Build the table of docs/database.md from a result."""
    lines = ["| command | database | images per second | seconds | peak memory |", "|---|---|---|---|---|"]
    for step, what in STEPS.items():
        for driver, title in DRIVERS.items():
            figures = result["figures"][driver][step]
            rate, seconds, memory = (figures[key] for key in ("images_per_second", "seconds", "peak_memory_mb"))
            shown = (
                f"{rate['mean']:,.0f} ({rate['least']:,.0f} to {rate['most']:,.0f})" if step != "found_again" else ""
            )
            lines.append(f"| {what} | {title} | {shown} | {seconds['mean']:.2f} | {memory['most']:.0f} MB |")
    origin = (
        f"{result['processor']}, {result['cores']} cores, {result['num_images']:,} images, "
        f"{result['figures']['sqlite']['ingest']['seconds']['runs']} runs"
    )
    return "\n".join([*lines, "", f"Measured by `python -m benchmarks.database` on {origin}.", ""])


def main() -> None:
    """Measure, save, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {driver: {step: [] for step in STEPS} for driver in DRIVERS}
    cluster = Cluster()
    try:
        cluster.start()
        for _ in range(arguments.runs):
            for driver in DRIVERS:
                with tempfile.TemporaryDirectory() as scratch:
                    measured = measure_driver(driver, cluster, arguments.dataset_folder.absolute(), Path(scratch))
                    for step, facts in measured.items():
                        runs[driver][step].append(facts)
                        print(
                            f"{driver} {step}: {facts['seconds']:.2f} s, {facts['peak_memory_mb']:.0f} MB", flush=True
                        )
    finally:
        cluster.remove()
    every = [facts for steps in runs.values() for done in steps.values() for facts in done]
    (digest,) = {facts["digest"] for facts in every}
    keys = ("seconds", "images_per_second", "peak_memory_mb")
    figures = {
        driver: {step: {key: summarize([facts[key] for facts in done]) for key in keys} for step, done in steps.items()}
        for driver, steps in runs.items()
    }
    save_result("database", {"data_digest": digest, "num_images": every[0]["images"], "figures": figures})
    write_table(DOCUMENT, "database", build_table(load_result("database")))


if __name__ == "__main__":
    main()
