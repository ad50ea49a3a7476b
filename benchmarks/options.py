"""What the options that are off by default give: augmentation, averaging, early stopping, imbalanced classes.

    python -m benchmarks.options --dataset_folder DATA [--set whole|imbalanced] [--num_images 5000] [--num_seeds 5]
        [--recipe small] [--option "--mixup 0.2"] ...
    python -m benchmarks.options    writes the table in docs/augmentation.md anew

DATA holds real CIFAR-10. Each seed draws its own images to train on from the training set, apart from the last 2,000 of
it, on which the run is judged, by single views; the test set takes no part. The imbalanced set has 20 times as many
images of the first class as of the last, and is judged on the same images, of all classes alike. Each option is
compared with the recipe alone on the same images and seed. A run has one thread, so that several can run beside each
other. Runs that an interrupted call has measured are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import PROJECT, load_result, measure_recipe, save_result, write_table
from benchmarks.small_sets import NUM_HELD_OUT
from benchmarks.subsets import write_subset
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot

DOCUMENT = PROJECT / "docs" / "augmentation.md"
LARGEST_RATIO = 20
"""Of the numbers of images of two classes of the imbalanced set."""
JUDGED = "--validation_fraction 0.1 --keep best"
OPTIONS = {
    "whole": [
        *("--color_jitter 0.1", "--color_jitter 0.3", "--rand_augment 3", "--rand_augment 9"),
        *("--mixup 0.1", "--mixup 0.4", "--cutmix 0.3", "--cutmix 1.0", "--ema_decay 0.98", "--ema_decay 0.995"),
        *(JUDGED, f"{JUDGED} --early_stopping 4"),
    ],
    "imbalanced": ["--class_weights balanced", "--sampler balanced", "--sampler balanced --cutmix 0.3"],
}
"""What is tried on each set if nothing is named."""


def draw_images(snapshot: Snapshot, kind: str, num_images: int, seed: int) -> NDArray[np.int64]:
    """Draw the indices of about this many images to train on; of an imbalanced set, fewer of each class than before."""
    order = np.random.default_rng(seed).permutation(snapshot.num_train - NUM_HELD_OUT)
    if kind == "whole":
        return order[:num_images]
    num_classes = len(snapshot.classes)
    shares = LARGEST_RATIO ** (-np.arange(num_classes) / (num_classes - 1))
    counts = np.rint(shares / shares.sum() * num_images).astype(int)
    labels = snapshot.labels[order]
    return np.concatenate([order[labels == label][:count] for label, count in enumerate(counts)])


def measure(snapshot: Snapshot, kind: str, num_images: int, recipe: str, option: str, seed: int) -> dict[str, Any]:
    """Train with an option on images that the seed draws; return the accuracy on the images that are held out."""
    drawn = draw_images(snapshot, kind, num_images, seed)
    held_out = np.arange(snapshot.num_train - NUM_HELD_OUT, snapshot.num_train)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_subset(snapshot, Path(scratch), drawn, held_out)
        run = measure_recipe(recipe, seed, folder, options=[*option.split(), "--num_threads", "1"])
    facts = {"set": kind, "num_images": num_images, "recipe": recipe, "option": option, "seed": seed}
    return {
        **facts,
        "accuracy": run["accuracy_single_view"],
        "cpu_seconds": run["cpu_seconds"],
        "code_digest": run["code_digest"],
    }


def build_table(result: dict[str, Any]) -> str:
    """Build the table of docs/augmentation.md: a row a set and an option, those of a set from the best to the worst."""
    if not result:
        return "Not measured yet: `python -m benchmarks.options`\n"
    keys = ("set", "num_images", "recipe")
    groups: dict[tuple[Any, ...], dict[str, dict[int, dict[str, Any]]]] = {}
    for run in result["runs"]:
        options = groups.setdefault(tuple(run[key] for key in keys), {})
        options.setdefault(run["option"], {})[run["seed"]] = run
    lines = [
        "| data set and recipe | options | accuracy | paired difference | CPU time |",
        "|---|---|---|---|---|",
    ]
    for (kind, num_images, recipe), options in sorted(groups.items()):
        rows = []
        for option, runs in options.items():
            accuracy, seconds = (
                statistics.fmean(run[key] for run in runs.values()) for key in ("accuracy", "cpu_seconds")
            )
            pairs = [
                run["accuracy"] - options[""][seed]["accuracy"]
                for seed, run in runs.items()
                if option and seed in options.get("", {})
            ]
            spread = f" ± {statistics.stdev(pairs):.1%}" if len(pairs) > 1 else ""
            difference = f"{statistics.fmean(pairs):+.1%}{spread} ({len(pairs)})" if pairs else ""
            name = f"`{option}`" if option else "none"
            cells = f"{name} | {accuracy:.1%} | {difference} | {seconds:.0f} s |"
            rows.append((accuracy, f"| {kind}, {num_images:,} images, `{recipe}` | {cells}"))
        lines += [row for _, row in sorted(rows, reverse=True)]
    return "\n".join(lines).replace("%", " %") + "\n"


def main() -> None:
    """Measure what is asked for, save after each run, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path)
    parser.add_argument("--set", choices=list(OPTIONS), action="append", default=[], dest="sets")
    parser.add_argument("--num_images", type=int, default=5000)
    parser.add_argument("--num_seeds", type=int, default=5)
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--option", action="append", default=[], dest="options")
    arguments = parser.parse_args()
    for kind in (arguments.sets or OPTIONS) if arguments.dataset_folder else ():
        snapshot = load_snapshot(arguments.dataset_folder)
        for seed in range(arguments.num_seeds):
            for option in ["", *(arguments.options or OPTIONS[kind])]:
                facts = {"set": kind, "num_images": arguments.num_images, "recipe": arguments.recipe}
                facts |= {"option": option, "seed": seed}
                runs = load_result("options").get("runs", [])
                if any(run.items() >= facts.items() for run in runs):
                    continue
                runs.append(measure(snapshot, kind, arguments.num_images, arguments.recipe, option, seed))
                save_result("options", {"runs": runs})
                print(f"{kind}, {option or 'none'}, seed {seed}: {runs[-1]['accuracy']:.2%}", flush=True)
    write_table(DOCUMENT, "options", build_table(load_result("options")))


if __name__ == "__main__":
    main()
