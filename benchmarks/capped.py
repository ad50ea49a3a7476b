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
from numpy.typing import NDArray

from benchmarks.measure import build_parser, measure_in_turn, measure_recipe
from benchmarks.time_to_accuracy import measure_record
from image_classifier.data.snapshot import load_snapshot

NUM_TRAIN, NUM_TEST = 4000, 1000


def write_part(dataset_folder: Path, folder: Path) -> Path:
    """Write the first images of a data set in CIFAR-10's binary layout."""
    snapshot = load_snapshot(dataset_folder)

    def write(name: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        rows = np.concatenate([labels.astype(np.uint8)[:, None], images.reshape(len(images), -1)], axis=1)
        (folder / name).write_bytes(rows.tobytes())

    (images, labels), (test_images, test_labels) = snapshot.train, snapshot.test
    for number in range(5):
        part = slice(number * NUM_TRAIN // 5, (number + 1) * NUM_TRAIN // 5)
        write(f"data_batch_{number + 1}.bin", images[part], labels[part])
    write("test_batch.bin", test_images[:NUM_TEST], test_labels[:NUM_TEST])
    (folder / "batches.meta.txt").write_text("\n".join(snapshot.classes) + "\n")
    return folder


def main() -> None:
    """Measure both sides and save the ratio."""
    parser = build_parser(__doc__)
    parser.set_defaults(instruction_set="avx2")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    cap = arguments.instruction_set
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_part(arguments.dataset_folder, Path(scratch))

        def measure_fast(seed: int) -> dict[str, Any]:
            run = measure_recipe("fast", seed, folder, cap)
            return {**run, "seconds": run["training_seconds"]}

        def measure_other(seed: int) -> dict[str, Any]:
            run = measure_record(seed, folder, cap)
            return {**run, "seconds": sum(run["epoch_seconds"])}

        measure_in_turn(f"capped_{cap}", {"trainer": measure_fast, "baseline": measure_other}, arguments.runs)


if __name__ == "__main__":
    main()
