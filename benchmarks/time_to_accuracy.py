"""Time to the accuracy of the 94 % record: recipe `fast` against the record's algorithm, moved to this CPU.

    python -m benchmarks.time_to_accuracy --dataset_folder DATA [--instruction_set avx2] [--runs 5]
                                         [--baseline_runs 5]

DATA holds real CIFAR-10. The trainer's seconds are those of the whole command, with start, record, digests and files;
the baseline's only those from the data in memory to its evaluation. It gets jemalloc where the system has it. Both
sides run in turn; an interrupted call goes on with the seeds that are missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measure import build_parser, find_jemalloc, measure_baseline, measure_in_turn, measure_recipe
from image_classifier.choices import InstructionSet


def measure_record(seed: int, dataset_folder: Path, instruction_set: InstructionSet) -> dict[str, Any]:
    """Train the record's algorithm, in BF16 unless the cap leaves none."""
    options = ["--precision", "bf16" if instruction_set in ("native", "avx512_bf16") else "fp32"]
    return measure_baseline("airbench94_muon", seed, dataset_folder, instruction_set, options, **find_jemalloc())


def main() -> None:
    """Measure both sides and save the ratio."""
    parser = build_parser(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--baseline_runs", type=int, default=5)
    arguments = parser.parse_args()
    folder, instruction_set = arguments.dataset_folder, arguments.instruction_set

    def measure_fast(seed: int) -> dict[str, Any]:
        return measure_recipe("fast", seed, folder, instruction_set)

    def measure_other(seed: int) -> dict[str, Any]:
        run = measure_record(seed, folder, instruction_set)
        return {**run, "seconds": run["training_seconds"]}

    sides = {"trainer": measure_fast, "baseline": measure_other}
    measure_in_turn(f"time_to_accuracy_{instruction_set}", sides, arguments.runs, arguments.baseline_runs)


if __name__ == "__main__":
    main()
