"""Small training sets: what recipe `small` was chosen from, and from how many images `fast` is better.

    python -m benchmarks.small_sets --dataset_folder DATA --num_images 300 --num_images 3000 \
        --variant "small" --variant "small --num_epochs 12" --variant "fast" [--num_seeds 3]
    python -m benchmarks.small_sets    writes the table in benchmarks/README.md anew

DATA holds real CIFAR-10. Each seed draws its own images to train on from the training set, apart from the last 2,000 of
it, on which the run is judged, by single views; the test set takes no part. A variant is a recipe and options; it runs
on one thread, so that several can run beside each other. Runs that an interrupted call has measured are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import PROJECT, load_result, measure_recipe, save_result, write_table
from benchmarks.subsets import write_subset
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot

DOCUMENT = PROJECT / "benchmarks" / "README.md"
NUM_HELD_OUT = 2000


def measure(snapshot: Snapshot, num_images: int, variant: str, seed: int) -> dict[str, Any]:
    """Train a variant on images that the seed draws; return its accuracy on the images that are held out."""
    drawn = np.random.default_rng(seed).permutation(snapshot.num_train - NUM_HELD_OUT)[:num_images]
    held_out = np.arange(snapshot.num_train - NUM_HELD_OUT, snapshot.num_train)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_subset(snapshot, Path(scratch), drawn, held_out)
        recipe, *options = variant.split()
        run = measure_recipe(recipe, seed, folder, options=[*options, "--num_threads", "1"])
    return {
        "variant": variant,
        "num_images": num_images,
        "seed": seed,
        "accuracy": run["accuracy_single_view"],
        "cpu_seconds": run["cpu_seconds"],
        "code_digest": run["code_digest"],
    }


def build_table(result: dict[str, Any]) -> str:
    """Build the table of benchmarks/README.md: a row a variant, a column a number of images."""
    runs = result["runs"]
    sizes = sorted({run["num_images"] for run in runs})
    lines = ["| recipe and options | " + " | ".join(f"{size:,} images" for size in sizes) + " |"]
    lines.append("|---|" + "---|" * len(sizes))
    for variant in sorted({run["variant"] for run in runs}):
        cells = []
        for size in sizes:
            values = [run["accuracy"] for run in runs if (run["variant"], run["num_images"]) == (variant, size)]
            spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1%}{spread} ({len(values)})" if values else "")
        lines.append(f"| `{variant}` | {' | '.join(cells)} |")
    return "\n".join(lines).replace("%", " %") + "\n"


def main() -> None:
    """Measure what is asked for, save after each run, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path)
    parser.add_argument("--num_images", type=int, action="append", default=[])
    parser.add_argument("--variant", action="append", default=[])
    parser.add_argument("--num_seeds", type=int, default=3)
    arguments = parser.parse_args()
    for num_images in arguments.num_images:
        snapshot = load_snapshot(arguments.dataset_folder)
        for seed in range(arguments.num_seeds):
            for variant in arguments.variant:
                runs = load_result("small_sets").get("runs", [])
                if (variant, num_images, seed) in {(run["variant"], run["num_images"], run["seed"]) for run in runs}:
                    continue
                runs.append(measure(snapshot, num_images, variant, seed))
                save_result("small_sets", {"runs": runs})
                print(f"{variant}: {num_images:,} images, seed {seed}: {runs[-1]['accuracy']:.2%}", flush=True)
    write_table(DOCUMENT, "small_sets", build_table(load_result("small_sets")))


if __name__ == "__main__":
    main()
