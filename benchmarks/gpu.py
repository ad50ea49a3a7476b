"""On a GPU: recipe `fast` beside the record's algorithm, and beside the record's own script where there is a copy.

    python -m benchmarks.gpu --dataset_folder DATA [--runs 3] [--device cuda] [--script airbench94_muon.py]

DATA holds real CIFAR-10. The trainer's seconds are those of the whole command, and of its epochs alone; those of the
algorithm are counted from the data in memory, as its author does. A script of his prints a table of its own, which is
shown and not read: here it counts from its command to its end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import measure_baseline, measure_command, measure_in_turn, measure_recipe


def main() -> None:
    """Measure the sides in turn and save the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--script", type=Path, help="the record's own, which reads its data by itself")
    arguments = parser.parse_args()
    device = ["--device", arguments.device]

    def measure_fast(seed: int) -> dict[str, Any]:
        return measure_recipe("fast", seed, arguments.dataset_folder, options=device)

    def measure_record(seed: int) -> dict[str, Any]:
        run = measure_baseline("airbench94_muon", seed, arguments.dataset_folder, options=device)
        return {**run, "command_seconds": run["seconds"], "seconds": run["training_seconds"]}

    if arguments.script:
        measurement = measure_command([sys.executable, arguments.script.resolve()])
        print(f"{arguments.script}: {measurement.seconds:.1f} s, and its last line is: {measurement.last_line}")
    measure_in_turn(f"gpu_{arguments.device}", {"trainer": measure_fast, "baseline": measure_record}, arguments.runs)


if __name__ == "__main__":
    main()
