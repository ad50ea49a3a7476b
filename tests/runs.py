"""Finished run folders, made in milliseconds: what training leaves, without the training."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from image_classifier.choices import Fit, Views
from image_classifier.metrics import compute_metrics
from image_classifier.model.catalog import build_classifier
from image_classifier.tracking import layout
from image_classifier.tracking.checkpoint import Model, serialize_model
from image_classifier.tracking.reading import read_manifest, serialize_predictions
from image_classifier.tracking.run import RunFolder
from tests.tiny import make_training

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def draw_predictions(
    accuracy: float, num_images: int, num_classes: int, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draw probabilities [N, C] of about this accuracy, surer where they are right, and labels [N].

    The labels depend on the numbers of images and classes alone, as on one test set.
    """
    labels = np.random.default_rng(0).permutation(np.arange(num_images) % num_classes)
    generator = np.random.default_rng(seed)
    is_right = generator.random(num_images) < accuracy
    predicted = np.where(is_right, labels, (labels + generator.integers(1, num_classes, num_images)) % num_classes)
    rest = generator.dirichlet(np.ones(num_classes), num_images)
    confidence = generator.beta(np.where(is_right, 6, 3), 2)[:, None] * 0.5 + 0.5
    probabilities = confidence * np.eye(num_classes)[predicted] + (1 - confidence) * rest
    return probabilities.astype(np.float32), labels


def build_epochs(num_epochs: int, *, validation: bool = False) -> list[dict[str, Any]]:
    """Build the lines of metrics.jsonl of a training that goes well."""
    epochs = []
    for epoch in range(1, num_epochs + 1):
        losses = [0.5 + 1.7 * float(np.exp(-(epoch - 1 + part / 20) / 2.2)) for part in range(20)]
        line: dict[str, Any] = {
            "epoch": epoch,
            "step": 100 * epoch,
            "train_loss": float(np.mean(losses)),
            "train_accuracy": 0.85 * (1 - float(np.exp(-(epoch + 0.6) / 2.2))),
            "loss_by_part": losses,
            "learning_rate": 0.1,
            "seconds": 20.0,
            "images_per_second": 2500.0,
        }
        if validation:
            line |= {"validation_loss": losses[-1] + 0.05, "validation_accuracy": line["train_accuracy"] - 0.02}
        epochs.append(line)
    return epochs


def compute_evaluation_of(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], classes: Sequence[str]
) -> dict[str, Any]:
    """Compute what evaluation.json holds from predictions."""
    metrics = compute_metrics(probabilities, labels, classes)
    single = {"num_images": len(labels), "views": "one", "accuracy_single_view": metrics["accuracy"]}
    return {"format_version": 1, **single, **metrics}


def build_record(name: str, data: str, classes: Sequence[str], num_test: int, **settings: Any) -> dict[str, Any]:
    """Build run.json of the run `<experiment>/<run>` on the data set of this name."""

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    experiment_name, _, run_name = name.partition("/")
    training = dataclasses.asdict(make_training(device="cpu", precision="fp32", **settings))
    return {
        "format_version": 1,
        "experiment_name": experiment_name,
        "run_name": run_name,
        "started_at": "2026-01-02T03:04:05+00:00",
        "command": ["image_classifier_trainer", "--experiment_name", experiment_name, "--run_name", run_name],
        "recipe": "default",
        "settings": {key: list(value) if isinstance(value, tuple) else value for key, value in training.items()},
        "execution": {
            "num_workers": 1,
            "checkpoint_every": "1epochs",
            "keep_checkpoints": 2,
            "dataset_folder": f"data/{data}",
            "experiments_folder": "experiments",
            "pretrained_model": None,
        },
        "data": {
            "name": data,
            "digest": digest(data),
            "classes": list(classes),
            "num_train": 50_000,
            "num_validation": 0,
            "num_test": num_test,
        },
        "pretrained": None,
        "code": {"version": "0.1.0", "digest": digest("code"), "commit": None, "uncommitted_changes": None},
        "environment": {
            "python": "3.11",
            "distributions": {"numpy": "2.4.6", "torch": "2.14.1"},
            "digest": digest("environment"),
            "lock_digest": None,
        },
        "machine": {
            "class": {"architecture": "x86_64", "instruction_set": "avx2", "gpu": None},
            "digest": digest("machine"),
        },
    }


def build_model_file(classes: Sequence[str], data_digest: str, views: Views = "mirror", fit: Fit = "squeeze") -> bytes:
    """Build model.pth of a LeNet that was never trained."""
    classifier = build_classifier("lenet", len(classes), input_mean=(0.5,) * 3, input_std=(0.25,) * 3, seed=0)
    origin = {"experiment_name": "experiment", "run_name": "run", "data_digest": data_digest, "code_digest": "0" * 64}
    return serialize_model(Model(classifier, "lenet", tuple(classes), views, origin, fit))


def write_image_folder(folder: Path, classes: Sequence[str], *, num_test: int = 7) -> Path:
    """Write a data set of noise, two images a class to train on: `train/CLASS/*.png` and `test/CLASS/*.png`."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", num_test)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def write_run(
    experiments: Path,
    name: str = "experiment/run",
    *,
    accuracy: float = 0.8,
    data: str = "cifar10",
    classes: Sequence[str] = CLASSES,
    num_images: int = 400,
    num_epochs: int = 3,
    predictions_seed: int | None = None,
    changes: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write a finished run folder of this test accuracy, and return its path.

    Args:
        name: `<experiment>/<run>`.
        predictions_seed: which images are right; the run's seed where left out.
        changes: of the parts of run.json, to add to what they hold.
        settings: that differ from the defaults.
    """
    path = experiments / name
    path.mkdir(parents=True)
    folder = RunFolder(path)
    seed = settings.get("seed", 0) if predictions_seed is None else predictions_seed
    probabilities, labels = draw_predictions(accuracy, num_images, len(classes), seed)
    evaluation = compute_evaluation_of(probabilities, labels, classes)
    record = build_record(name, data, classes, num_images, num_epochs=num_epochs, **settings)
    for part, values in (changes or {}).items():
        record[part] = {**(record[part] or {"path": "model.pth"}), **values}
    epochs = build_epochs(num_epochs, validation=bool(settings.get("validation_fraction")))
    folder.write_json(layout.RECORD, record)
    for epoch in epochs:
        folder.append_line(layout.METRICS, epoch)
        head = hashlib.sha256(f"{name} {epoch['step']}".encode()).hexdigest()
        folder.append_line(layout.CHAIN, {"step": epoch["step"], "digest": head, "tensors": {}})
    folder.write(layout.MODEL, build_model_file(classes, record["data"]["digest"]))
    folder.write(layout.PREDICTIONS, serialize_predictions(probabilities, labels))
    folder.write_json(layout.EVALUATION, evaluation)
    folder.write(layout.FIGURE, b"a picture")  # which nothing reads, and which takes long to draw
    folder.finish(weights_digest="0" * 64, chain_head=head if epochs else "")
    return path


def reseal(folder: Path) -> None:
    """Write the manifest anew, as somebody would who wants a changed run to look whole."""
    manifest = read_manifest(folder)
    (folder / "manifest.json").unlink()
    RunFolder(folder).finish(weights_digest=manifest["weights_digest"], chain_head=manifest["chain_head"])
