"""Real runs small enough to make dozens of: LeNet on a few hundred sample images, one thread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from image_classifier.data.sample import write_sample
from image_classifier.settings import RunSettings, TrainingSettings

TRAINING = replace(
    TrainingSettings.from_recipe("notebook"),
    batch_size=10,
    learning_rate=0.01,
    device="cpu",
    digest_every=10,
)


_RESNET: dict[str, Any] = {
    **{"model": "resnet", "batch_size": 500, "shards": 0, "image_sizes": (32,), "views": "mirror"},
    **{"optimizer": "sgd", "learning_rate": 0.4, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    **{"schedule": "triangular", "warmup_fraction": 0.25, "label_smoothing": 0.1},
}


def make_training(**values: Any) -> TrainingSettings:
    """Make training settings of a network and an optimizer that go together with any other."""
    return TrainingSettings(**{**_RESNET, **values})


def write_tiny_dataset(folder: Path, *, num_train: int = 200, num_test: int = 60, seed: int = 0) -> Path:
    """Write a sample set of 200 training and 60 test images."""
    write_sample(folder, num_train=num_train, num_test=num_test, seed=seed)
    return folder


def make_settings(experiments: Path, dataset: Path, run_name: str = "run", **values: Any) -> RunSettings:
    """Make the settings of a tiny run: 2 epochs of 20 steps; values may be of either kind."""
    training = {name: value for name, value in values.items() if name in TrainingSettings.__dataclass_fields__}
    others = {name: value for name, value in values.items() if name not in training}
    return RunSettings(
        experiments_folder=experiments,
        experiment_name="tiny",
        run_name=run_name,
        dataset_folder=dataset,
        training=replace(TRAINING, **training),
        **{"num_threads": 1, "num_workers": 0, **others},
    )
