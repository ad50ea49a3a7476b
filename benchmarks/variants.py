"""What the settings of the recipes were chosen from: variants of them, judged on held-out training images.

    image_classifier_trainer --experiment_name variants --run_name v1 --recipe fast --validation_fraction 0.2 \
        --num_epochs 8 --image_sizes [32] --dataset_folder DATA
    python -m benchmarks.variants experiments/variants/*

Each run trains on four fifths of the training set and is judged, by single views, on the rest. Adds them to
benchmarks/results/variants.json and writes the table in benchmarks/README.md; that of variants_before.json is of
airbench networks that did not repeat the edges of their images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.floor import count_training
from benchmarks.measure import PROJECT, load_result, save_result, write_table
from image_classifier.recipe import load_recipe
from image_classifier.settings import restore_training_settings
from image_classifier.tracking.checking import check_finished
from image_classifier.tracking.reading import read_epochs, read_record

DOCUMENT = PROJECT / "benchmarks" / "README.md"


def describe_run(folder: Path) -> dict[str, Any]:
    """Describe how a run departs from its recipe, and what came of it."""
    check_finished(folder)
    record, epochs = read_record(folder), read_epochs(folder)
    recipe = load_recipe(record["recipe"])
    settings = {
        name: value
        for name, value in record["settings"].items()
        if name in recipe and recipe[name] != "auto" and name != "views"
    }
    return {
        "recipe": record["recipe"],
        "settings": settings,
        "seed": record["settings"]["seed"],
        "validation_fraction": record["settings"]["validation_fraction"],
        "operations": count_training(restore_training_settings(settings), record["data"]["num_train"]),
        "train_accuracy": epochs[-1]["train_accuracy"],
        "validation_accuracy": epochs[-1]["validation_accuracy"],
        "data_digest": record["data"]["digest"],
    }


def build_table(result: dict[str, Any]) -> str:
    """Build the table of benchmarks/README.md."""
    lines = [
        "| recipe | changed settings | training cost, TFLOP | training accuracy | accuracy on held-out images |",
        "|---|---|---|---|---|",
    ]
    for run in sorted(result["runs"], key=lambda run: (run["recipe"], run["operations"])):
        recipe = load_recipe(run["recipe"])
        different = [f"{name} {value}" for name, value in run["settings"].items() if value != recipe[name]]
        changed = ", ".join(different) or "none"
        lines.append(
            f"| `{run['recipe']}` | {changed} | {run['operations'] / 1e12:.0f} | {run['train_accuracy']:.1%} "
            f"| {run['validation_accuracy']:.1%} |"
        )
    return "\n".join(lines).replace("%", " %") + "\n"


def main() -> None:
    """Add runs and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", help="finished runs with a --validation_fraction")
    arguments = parser.parse_args()
    if arguments.runs:
        runs = {
            str((run["recipe"], run["settings"], run["seed"])): run for run in load_result("variants").get("runs", [])
        }
        for run in map(describe_run, arguments.runs):
            runs[str((run["recipe"], run["settings"], run["seed"]))] = run
        save_result("variants", {"runs": list(runs.values())})
    for name in ("variants", "variants_before"):
        write_table(DOCUMENT, name, build_table(load_result(name)))


if __name__ == "__main__":
    main()
