"""What publishing a run gives: parity, size, accuracy and speed of both files, beside torch on the same cores.

    python -m benchmarks.publishing --dataset_folder DATA RUN...

Each RUN is a finished run of a recipe on real CIFAR-10; it is published in a copy, once with a single view and, where
its recipe has test views, once with these.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import load_result, save_result, summarize
from image_classifier.choices import Views
from image_classifier.data.dataset import load_snapshot
from image_classifier.published.folder import INT8_MODEL, MANIFEST, PARITY
from image_classifier.published.predictor import Predictor, PublishedModel, load_predictor
from image_classifier.publishing.publish import PublishSettings, publish
from image_classifier.publishing.quantize import measure_speed
from image_classifier.tracking.checkpoint import load_model
from image_classifier.tracking.layout import MODEL
from image_classifier.tracking.reading import read_record
from image_classifier.training.evaluate import compute_probabilities

NUM_TIMED_IMAGES = 2048


class Eager(Predictor):
    """The run's model in torch, asked as the published one is."""

    def __init__(self, path: Path, views: Views, model: PublishedModel) -> None:
        super().__init__(None, model)
        self._classifier = load_model(path).classifier
        self._views = views

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool = False) -> NDArray[np.float32]:
        pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return compute_probabilities(self._classifier, pixels, views=self._views)


def measure_run(run: Path, views: Views, dataset_folder: Path) -> dict[str, Any]:
    """Publish a copy of a run and measure what came out."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(run, Path(scratch) / "run", ignore=shutil.ignore_patterns("published"))
        started = time.perf_counter()
        settings = PublishSettings(views=views != "one", dataset_folder=dataset_folder)
        folder = publish(copy, settings)
        seconds = time.perf_counter() - started
        parity, manifest = (json.loads((folder / name).read_text()) for name in (PARITY, MANIFEST))
        predictors: dict[str, Predictor] = {"fp32": load_predictor(folder)}
        predictors["torch"] = Eager(copy / MODEL, views, predictors["fp32"].model)
        if (folder / INT8_MODEL).exists():
            predictors["int8"] = load_predictor(folder, precision="int8")
        images = load_snapshot(dataset_folder).test[0][:NUM_TIMED_IMAGES]
        speed = measure_speed(predictors, np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
        return {
            "recipe": read_record(run)["recipe"],
            "views": views,
            "data_digest": manifest["data_digest"],
            "weights_digest": manifest["weights_digest"],
            "seconds": round(seconds, 1),
            "num_images": parity["num_images"],
            "parity": parity["fp32"],
            "int8": parity["int8"],
            "images_per_second": {name: summarize(rates) for name, rates in speed.items()},
        }


def main() -> None:
    """Measure each run with one view and with its own, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--dataset_folder", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    results = {(row["recipe"], row["views"]): row for row in load_result("publishing").get("models", [])}
    for run in arguments.runs:
        for views in dict.fromkeys(("one", load_model(run / MODEL).views)):
            row = measure_run(run, views, arguments.dataset_folder)
            results[row["recipe"], views] = row
            save_result("publishing", {"models": list(results.values())})
            speed = {name: round(figure["mean"]) for name, figure in row["images_per_second"].items()}
            print(row["recipe"], views, speed, row["int8"]["accuracy"], flush=True)


if __name__ == "__main__":
    main()
