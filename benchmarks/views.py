"""When six views are worth their time: accuracy on held-out training images, by how sure the first view is.

    image_classifier_trainer --experiment_name views --run_name v1 --validation_fraction 0.2 --dataset_folder DATA
    python -m benchmarks.views experiments/views/* --dataset_folder DATA

Writes benchmarks/results/views.json and the table in benchmarks/README.md.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import PROJECT, build_parser, save_result, write_table
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.split import compute_validation_split
from image_classifier.tracking.checkpoint import load_model
from image_classifier.tracking.layout import MODEL
from image_classifier.tracking.reading import read_record
from image_classifier.training import evaluate

THRESHOLDS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0]


def measure_run(folder: Path, dataset_folder: Path) -> dict[str, Any]:
    """Measure the share of images that are unsure, and the accuracy with six views of those, at each threshold."""
    record, snapshot = read_record(folder), load_snapshot(dataset_folder)
    settings = record["settings"]
    _, indices = compute_validation_split(settings["seed"], snapshot.num_train, settings["validation_fraction"])
    (images, labels), classifier = snapshot.train, load_model(folder / MODEL).classifier
    images, labels = images[indices], labels[indices]
    one = evaluate.compute_probabilities(classifier, images)
    evaluate.SURE = math.inf
    six = evaluate.compute_probabilities(classifier, images, views="six")
    second, first = np.sort(one, axis=1)[:, -2:].T
    thresholds = []
    for threshold in THRESHOLDS:
        is_unsure = first - second < threshold
        chosen = np.where(is_unsure[:, None], six, one).argmax(axis=1)
        accuracy = float((chosen == labels).mean())
        thresholds.append({"threshold": threshold, "unsure": float(is_unsure.mean()), "accuracy": accuracy})
    return {"recipe": record["recipe"], "seed": settings["seed"], "thresholds": thresholds}


def build_table(runs: list[dict[str, Any]]) -> str:
    """Build the table of benchmarks/README.md."""
    titles = "".join(f" `{run['recipe']}`: images below | accuracy |" for run in runs)
    lines = [f"| margin threshold |{titles}", "|---|" + "---|" * 2 * len(runs)]
    for row in zip(*(run["thresholds"] for run in runs), strict=True):
        threshold = "all images" if row[0]["threshold"] == 1 else f"{row[0]['threshold']}"
        lines.append(f"| {threshold} |" + "".join(f" {part['unsure']:.0%} | {part['accuracy']:.2%} |" for part in row))
    return "\n".join(lines).replace("%", " %") + "\n"


def main() -> None:
    """Measure each run and write the table."""
    parser = build_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs with a --validation_fraction")
    arguments = parser.parse_args()
    runs = [measure_run(folder, arguments.dataset_folder) for folder in arguments.runs]
    save_result("views", {"runs": runs})
    write_table(PROJECT / "benchmarks" / "README.md", "views", build_table(runs))


if __name__ == "__main__":
    main()
