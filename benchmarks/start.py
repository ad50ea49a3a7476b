"""What a user waits for before anything happens: help, reading the data again, checking a run's files, first step.

    python -m benchmarks.start --dataset_folder DATA --run RUN [--runs 10]

DATA holds real CIFAR-10 that was read before; RUN is a finished run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import PROJECT, measure_command, save_result, summarize

LOAD = """
import sys, time
from pathlib import Path
from image_classifier.data.dataset import load_snapshot
started = time.perf_counter()
snapshot = load_snapshot(Path(sys.argv[1]))
snapshot.images[0].sum()
print(time.perf_counter() - started)
"""


def measure_reading(dataset_folder: Path) -> float:
    """Measure the seconds from the call to the first image of a snapshot that exists, in a new process."""
    command = [sys.executable, "-c", LOAD, str(dataset_folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_first_step(dataset_folder: Path) -> float:
    """Measure the seconds from the trainer's command to the end of its first step, which its chain of digests shows."""
    with tempfile.TemporaryDirectory() as scratch:
        names = f"--experiments_folder {scratch} --experiment_name start --run_name run --digest_every 1".split()
        command = [sys.executable, "-m", "image_classifier.main", *names, "--dataset_folder", str(dataset_folder)]
        chain = Path(scratch) / "start" / "run" / "digests.jsonl"
        started = time.perf_counter()
        with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not chain.exists() and process.poll() is None:
                time.sleep(0.002)
            seconds = time.perf_counter() - started
            if process.poll() is not None:
                sys.exit(f"the trainer ended with exit status {process.returncode} before its first step")
            process.kill()
    return seconds


def main() -> None:
    """Measure each several times in turn and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    module = [sys.executable, "-m"]
    measure_reading(arguments.dataset_folder)
    figures: dict[str, list[float]] = {"help": [], "read_again": [], "verify_files_only": [], "first_step": []}
    for _ in range(arguments.runs):
        figures["help"].append(measure_command([*module, "image_classifier.main", "--help"]).seconds)
        figures["first_step"].append(measure_first_step(arguments.dataset_folder))
        figures["read_again"].append(measure_reading(arguments.dataset_folder))
        verify = [*module, "image_classifier", "verify", arguments.run, "--files_only"]
        figures["verify_files_only"].append(measure_command(verify).seconds)
    result = {name: summarize(values) for name, values in figures.items()}
    save_result("start", {"unit": "seconds", **result})
    for name, facts in result.items():
        print(f"{name}: {facts['mean']:.3f} s ({facts['least']:.3f} to {facts['most']:.3f})")


if __name__ == "__main__":
    main()
