"""Training on the runner that most people get, AVX2 without BF16: recipe `fast` beside the record's algorithm.

    python -m benchmarks.capped --dataset_folder DATA [--runs 3]

Both sides train all their epochs on the first 4,000 images of real CIFAR-10, which DATA holds: a step takes as long as
on all 50,000. The seconds are those of the epochs alone; what accuracy the sides reach on all images is not measured
under the cap. The notebook's job and recipe `quick` are short enough to be measured whole: `--instruction_set avx2` of
`notebook_job` and `recipes`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import build_parser, measure_in_turn, measure_recipe
from benchmarks.subsets import write_subset
from benchmarks.time_to_accuracy import measure_record
from image_classifier.data.dataset import load_snapshot

NUM_TRAIN, NUM_TEST = 4000, 1000


def main() -> None:
    """Measure both sides and save the ratio."""
    parser = build_parser(__doc__)
    parser.set_defaults(instruction_set="avx2")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    cap = arguments.instruction_set
    with tempfile.TemporaryDirectory() as scratch:
        snapshot = load_snapshot(arguments.dataset_folder)
        test = snapshot.num_train + np.arange(NUM_TEST)
        folder = write_subset(snapshot, Path(scratch), np.arange(NUM_TRAIN), test)

        def measure_fast(seed: int) -> dict[str, Any]:
            run = measure_recipe("fast", seed, folder, cap)
            return {**run, "seconds": run["training_seconds"]}

        def measure_other(seed: int) -> dict[str, Any]:
            run = measure_record(seed, folder, cap)
            return {**run, "seconds": sum(run["epoch_seconds"])}

        measure_in_turn(f"capped_{cap}", {"trainer": measure_fast, "baseline": measure_other}, arguments.runs)


if __name__ == "__main__":
    main()
