"""The notebook's job, done by this trainer and the notebook's own way: from the command to the finished result.

    python -m benchmarks.notebook_job --dataset_folder DATA [--instruction_set avx2] [--runs 3]

DATA holds cifar-10-batches-py, as real CIFAR-10 does. All sides train the same network with the same settings over
the same images, in turn; the trainer as it comes, and with `--engine eager`. An interrupted call goes on with the
seeds that are missing.
"""

from __future__ import annotations

from typing import Any

from benchmarks.measure import build_parser, measure_baseline, measure_in_turn, measure_recipe


def main() -> None:
    """Measure both sides and save the ratio."""
    parser = build_parser(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    folder, instruction_set = arguments.dataset_folder, arguments.instruction_set

    def measure_trainer(seed: int) -> dict[str, Any]:
        return measure_recipe("notebook", seed, folder, instruction_set)

    def measure_eager(seed: int) -> dict[str, Any]:
        return measure_recipe("notebook", seed, folder, instruction_set, ["--engine", "eager"])

    def measure_notebook(seed: int) -> dict[str, Any]:
        return measure_baseline("notebook", seed, folder, instruction_set)

    sides = {"trainer": measure_trainer, "eager": measure_eager, "baseline": measure_notebook}
    measure_in_turn(f"notebook_job_{instruction_set}", sides, arguments.runs)


if __name__ == "__main__":
    main()
