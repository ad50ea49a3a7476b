"""What a user waits for before anything happens: help, reading the data again, checking a run's files, first step.

    python -m benchmarks.start --dataset_folder DATA --run RUN [--runs 10]

DATA holds real CIFAR-10 that was read before; RUN is a finished run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import measure_command, save_result, summarize

LOAD = """
import sys, time
from pathlib import Path
from image_classifier.data.snapshot import load_snapshot
started = time.perf_counter()
snapshot = load_snapshot(Path(sys.argv[1]))
snapshot.images[0].sum()
print(time.perf_counter() - started)
"""


def measure_reading(dataset_folder: Path) -> float:
    """Measure the seconds from the call to the first image of a snapshot that exists, in a new process."""
    command = [sys.executable, "-c", LOAD, str(dataset_folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure each several times in turn and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    module = [sys.executable, "-m"]
    measure_reading(arguments.dataset_folder)
    figures: dict[str, list[float]] = {"help": [], "read_again": [], "verify_files_only": []}
    for _ in range(arguments.runs):
        figures["help"].append(measure_command([*module, "image_classifier.main", "--help"]).seconds)
        figures["read_again"].append(measure_reading(arguments.dataset_folder))
        verify = [*module, "image_classifier", "verify", arguments.run, "--files_only"]
        figures["verify_files_only"].append(measure_command(verify).seconds)
    result = {name: summarize(values) for name, values in figures.items()}
    save_result("start", {"unit": "seconds", **result})
    for name, facts in result.items():
        print(f"{name}: {facts['mean']:.3f} s ({facts['least']:.3f} to {facts['most']:.3f})")


if __name__ == "__main__":
    main()
