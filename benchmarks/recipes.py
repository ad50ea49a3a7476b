"""Accuracy, time and memory of each recipe over several seeds, from the command to the finished run folder.

    python -m benchmarks.recipes --dataset_folder DATA [--recipe NAME] [--num_seeds 5] [--instruction_set avx2]
                                 [--num_epochs 16]

DATA holds real CIFAR-10; `small` trains on its first 5,000 images, and is tested as the others. --num_epochs fits a
recipe to the time that there is. Runs that an interrupted call has measured already are not made again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import build_parser, load_result, measure_recipe, save_result, summarize
from benchmarks.subsets import write_subset
from image_classifier.data.dataset import load_snapshot
from image_classifier.recipe import RECIPES

NUM_SMALL = 5000
"""Images that `small` trains on: those of the sample set that `make train` takes where CIFAR-10 cannot be reached."""


def main() -> None:
    """Measure the recipes that are asked for, and save after each run."""
    parser = build_parser(__doc__)
    parser.add_argument("--recipe", choices=RECIPES, action="append")
    parser.add_argument("--num_seeds", type=int, default=5)
    parser.add_argument("--num_epochs", type=int, help="instead of the recipe's")
    arguments = parser.parse_args()
    length = {"num_epochs": arguments.num_epochs} if arguments.num_epochs else {}
    options = [text for name, value in length.items() for text in (f"--{name}", str(value))]
    capped = "" if arguments.instruction_set == "native" else f"_{arguments.instruction_set}"
    shorter = f"_{arguments.num_epochs}_epochs" if length else ""
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in arguments.recipe or RECIPES:
            folder = arguments.dataset_folder
            part = {"num_images": NUM_SMALL} if recipe == "small" else {}
            if part and not (Path(scratch) / "test_batch.bin").exists():
                snapshot = load_snapshot(folder)
                test = np.arange(snapshot.num_train, len(snapshot.labels))
                write_subset(snapshot, Path(scratch), np.arange(NUM_SMALL), test)
            if part:
                folder = Path(scratch)
            name = f"recipe_{recipe}{capped}{shorter}"
            runs = load_result(name).get("runs", [])
            for seed in range(arguments.num_seeds):
                if seed in {run["seed"] for run in runs}:
                    continue
                runs.append(measure_recipe(recipe, seed, folder, arguments.instruction_set, options))
                keys = ("accuracy", "accuracy_single_view", "seconds", "training_seconds", "peak_memory_mb")
                figures = {key: summarize([run[key] for run in runs]) for key in keys}
                save_result(name, {**length, **part, **figures, "runs": runs})
                print(f"{recipe} seed {seed}: {runs[-1]['accuracy']:.2%} in {runs[-1]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
