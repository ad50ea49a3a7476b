"""Fine-tuning on own classes beside training from nothing: small sets, equal time, the same test images.

    python -m benchmarks.fine_tuning --dataset_folder DATA [--num_images 20 50 100 500] [--num_seeds 5]
    python -m benchmarks.fine_tuning    writes the table in docs/own_images.md anew

DATA holds real CIFAR-10. A network of recipe `small` is trained once, on all images of six classes. The small sets are
of the other four: so many images of each, which the seed draws, and all of their test images. Both sides have the same
recipe, epochs and seed, in turn, and differ in `--pretrained_model` alone, so that a step takes equally long. McNemar's
test compares their answers seed by seed, Student's test their accuracies over the seeds, in pairs. Runs that an
interrupted call has measured are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import PROJECT, load_result, measure_command, save_result, to_row, write_table
from benchmarks.subsets import write_subset
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot
from image_classifier.tracking.checking import is_finished
from image_classifier.tracking.compare import compute_mcnemar_test, compute_t_probability
from image_classifier.tracking.reading import read_epochs, read_evaluation, read_predictions, read_record

DOCUMENT = PROJECT / "docs" / "own_images.md"
NEW_CLASSES = ("bird", "dog", "horse", "ship")
NUM_IMAGES = (20, 50, 100, 500)
"""Of each class."""


def train(folder: Path, name: str, data: Path, *options: str) -> tuple[dict[str, Any], NDArray[np.bool_]]:
    """Train by the command; return what it took and gave, and which test images are right."""
    names = f"--experiments_folder {folder} --experiment_name e --run_name {name}".split()
    command = [sys.executable, "-m", "image_classifier.main", *names, "--recipe", "small"]
    measurement = measure_command([*command, "--dataset_folder", str(data), *options])
    run = folder / "e" / name
    probabilities, labels = read_predictions(run)
    facts = {
        **to_row(measurement),
        "training_seconds": round(sum(epoch["seconds"] for epoch in read_epochs(run)), 3),
        "accuracy": read_evaluation(run)["accuracy"],
        "code_digest": read_record(run)["code"]["digest"],
    }
    return facts, probabilities.argmax(axis=1) == labels


def write_classes(
    snapshot: Snapshot, folder: Path, classes: Sequence[str], num_images: int | None = None, seed: int = 0
) -> Path:
    """Write all test images of some classes, and so many images of each to train on, or all."""
    order = np.random.default_rng(seed).permutation(snapshot.num_train)
    labels = [snapshot.classes.index(name) for name in classes]
    train = np.concatenate([order[snapshot.labels[order] == label][:num_images] for label in labels])
    test = np.flatnonzero(np.isin(snapshot.labels, labels))
    folder.mkdir()
    return write_subset(snapshot, folder, np.sort(train), test[test >= snapshot.num_train], classes)


def pretrain(snapshot: Snapshot, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Train the weights to start from, `e/old` below a folder, unless they lie there already; what they took."""
    earlier: dict[str, Any] = load_result("fine_tuning").get("pretraining", {})
    if earlier and is_finished(folder / "e" / "old"):
        return earlier
    classes = [name for name in snapshot.classes if name not in NEW_CLASSES]
    with tempfile.TemporaryDirectory() as scratch:
        facts, _ = train(folder, "old", write_classes(snapshot, Path(scratch) / "old", classes), *options)
    return {**facts, "classes": classes}


def measure_pair(snapshot: Snapshot, weights: Path, num_images: int, seed: int) -> dict[str, Any]:
    """Train both sides on images that the seed draws, in turn, and compare their answers."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_classes(snapshot, folder / "new", NEW_CLASSES, num_images, seed)
        batch_size = min(125, num_images * len(NEW_CLASSES))  # the recipe's, cut to the set
        options = ["--seed", str(seed), "--batch_size", str(batch_size)]
        nothing, nothing_right = train(folder, "nothing", data, *options)
        tuned, tuned_right = train(folder, "tuned", data, *options, "--pretrained_model", str(weights))
    only_nothing, only_tuned = int((nothing_right & ~tuned_right).sum()), int((tuned_right & ~nothing_right).sum())
    return {
        "num_images": num_images,
        "seed": seed,
        "num_test": len(tuned_right),
        "from_nothing": nothing,
        "fine_tuned": tuned,
        "only_from_nothing_right": only_nothing,
        "only_fine_tuned_right": only_tuned,
        "p_value": compute_mcnemar_test(only_nothing, only_tuned),
    }


def compute_paired_test(runs: Sequence[dict[str, Any]]) -> float:
    """Compute the two-sided p-value of Student's test, of the differences that the seeds have in accuracy."""
    gains = [run["fine_tuned"]["accuracy"] - run["from_nothing"]["accuracy"] for run in runs]
    if len(gains) < 2:
        return 1.0
    t = abs(statistics.fmean(gains)) / (statistics.stdev(gains) / len(gains) ** 0.5)
    return 1 - compute_t_probability(t, len(gains) - 1)


def build_table(result: dict[str, Any]) -> str:
    """Build the table of docs/own_images.md: a row a number of images."""
    lines = [
        "| images per class | from scratch | fine-tuned | test images correct only from scratch; only fine-tuned | "
        "largest McNemar p of a seed | p of the paired t-test | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in sorted({run["num_images"] for run in result["runs"]}):
        runs = [run for run in result["runs"] if run["num_images"] == size]
        accuracies, seconds = [], []
        for side in ("from_nothing", "fine_tuned"):
            values = [run[side]["accuracy"] for run in runs]
            spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
            accuracies.append(f"{statistics.fmean(values):.1%}{spread} ({len(values)})")
            seconds.append(f"{statistics.fmean(run[side]['cpu_seconds'] for run in runs):.1f}")
        alone = [sum(run[f"only_{side}_right"] for run in runs) for side in ("from_nothing", "fine_tuned")]
        p_values = [max(run["p_value"] for run in runs), compute_paired_test(runs)]
        shown = [f"{p:.2g}" for p in p_values]
        cells = [str(size), *accuracies, f"{alone[0]:,}; {alone[1]:,}", *shown, "; ".join(seconds)]
        lines.append(f"| {' | '.join(cells)} |")
    pretraining = result["pretraining"]
    lines.append("")
    lines.append(
        f"Pretraining took {pretraining['seconds']:.0f} s and reached {pretraining['accuracy']:.1%} on "
        f"{', '.join(pretraining['classes'])}."
    )
    return "\n".join(lines).replace("%", " %") + "\n"


def main() -> None:
    """Measure what is asked for, save after each pair, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset_folder", type=Path)
    parser.add_argument("--num_images", type=int, nargs="+", default=NUM_IMAGES)
    parser.add_argument("--num_seeds", type=int, default=5)
    parser.add_argument("--weights_folder", type=Path, default=Path("experiments/fine_tuning"), help="where they lie")
    parser.add_argument("--pretraining_options", default="", help="such as '--num_epochs 1', to try this script")
    arguments = parser.parse_args()
    if arguments.dataset_folder is not None:
        snapshot = load_snapshot(arguments.dataset_folder)
        folder: Path = arguments.weights_folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        runs = load_result("fine_tuning").get("runs", [])
        pretraining = pretrain(snapshot, folder, arguments.pretraining_options.split())
        save_result("fine_tuning", {"pretraining": pretraining, "runs": runs})
        for num_images in arguments.num_images:
            for seed in range(arguments.num_seeds):
                if (num_images, seed) in {(run["num_images"], run["seed"]) for run in runs}:
                    continue
                runs.append(measure_pair(snapshot, folder / "e" / "old" / "model.pth", num_images, seed))
                save_result("fine_tuning", {"pretraining": pretraining, "runs": runs})
                sides = (f"{runs[-1][side]['accuracy']:.2%}" for side in ("from_nothing", "fine_tuned"))
                print(f"{num_images} images of each class, seed {seed}: {' and '.join(sides)}", flush=True)
    write_table(DOCUMENT, "fine_tuning", build_table(load_result("fine_tuning")))


if __name__ == "__main__":
    main()
